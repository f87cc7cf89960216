"""A run before it starts: its parts made and its settings checked, and nothing written."""

from __future__ import annotations

import dataclasses

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from top_jax.build import build_abstract_model, build_reduction
from top_jax.config import RunConfig
from top_jax.data import Batches, Source, check_classes, eval_batches, open_source, train_batches
from top_jax.models import Backbone
from top_jax.sharding import by_image, check_divisible, make_mesh, replicated
from top_jax.training.keep_ratio import Stage, stages
from top_jax.training.optimizer import learning_rate_schedule, make_optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, ready to start: everything that bad input could stop has been looked at, and nothing written."""

    config: RunConfig
    model: Backbone  # shapes only, in eval mode
    scan: str | None  # the implementation that its scans run, where it has any
    train_source: Source
    eval_source: Source
    eval_batch_size: int
    total_steps: int
    eval_every: int
    stages: tuple[Stage, ...]  # of the keep-ratio warm-up
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh

    @property
    def by_image(self) -> NamedSharding:
        """Of a batch: its rows over all devices."""
        return by_image(self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        """Of what every device has whole."""
        return replicated(self.mesh)

    def train_batches(self) -> Batches:
        """The stream of training batches, from its beginning."""
        config, size = self.config, self.model.config.img_size
        return train_batches(
            self.train_source,
            config.data,
            augment=config.augment,
            img_size=size,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_batches(self) -> Batches:
        """One pass over the evaluation split."""
        size = self.model.config.img_size
        return eval_batches(
            self.eval_source,
            self.config.data,
            img_size=size,
            batch_size=self.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def make_plan(config: RunConfig) -> Plan:
    """Checks everything about a run before it starts; see `Plan`.

    Raises:
        InputError: anything that does not fit.
    """
    pruning = build_reduction(config.pruning)
    model = build_abstract_model(config.model, pruning)
    train_source, eval_source = (open_source(config.data, train=train) for train in (True, False))
    for source in (train_source, eval_source):
        check_classes(source, config.model.num_classes, f"set --config.model.num_classes={source.num_classes}")
    eval_batch_size = config.eval_batch_size or config.batch_size
    check_divisible("batch_size", config.batch_size, config.optimizer.accumulate)
    check_divisible("eval_batch_size", eval_batch_size)
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = config.total_steps or max(1, round(config.epochs * steps_per_epoch))
    schedule = learning_rate_schedule(
        config.optimizer, batch_size=config.batch_size, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    plan = Plan(
        config=config,
        model=model,
        scan=model.scan_implementation,
        train_source=train_source,
        eval_source=eval_source,
        eval_batch_size=eval_batch_size,
        total_steps=total_steps,
        eval_every=max(1, round(config.eval_every_epochs * steps_per_epoch)),
        stages=stages(
            config.pruning,
            num_patches=model.config.num_patches,
            depth=model.config.depth,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        ),
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, schedule),
        mesh=make_mesh(config.fsdp),
    )
    plan.train_batches()  # nothing is read yet, but settings are checked
    plan.eval_batches()
    return plan
