"""Reads and checks everything that a run needs, so that bad input ends it before anything is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from top_jax import distributed
from top_jax.build import Model, backbone_of, build_abstract_model, build_reduction, crop_size
from top_jax.config import RunConfig
from top_jax.data import Batches, Source, check_classes, eval_batches, is_dense, open_source, train_batches
from top_jax.data.segmentation import SegmentationReader
from top_jax.errors import InputError
from top_jax.models.weights import Weights, split_weights, statistics_of
from top_jax.pruning import Reduction
from top_jax.sharding import by_image, check_divisible, in_parts, make_mesh
from top_jax.training.checkpoints import Checkpoints, Position
from top_jax.training.keep_ratio_warmup import Stage, stages
from top_jax.training.optimizer import learning_rate_schedule, make_optimizer
from top_jax.training.run_directory import DataFacts, RunDirectory
from top_jax.training.saved_weights import initial_weights, teacher_weights
from top_jax.training.steps import TrainState, create_state
from top_jax.training.tasks import Task, task_of
from top_jax.training.weights import abstract_weights, keep_teacher
from top_jax.values import LARGEST_COUNT


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run's steps, derived from its config without reading a file.

    Attributes:
        config: the run's config.
        model: with the final pruning; shapes only, in eval mode.
        image_size: (height, width) of the images that it trains on.
        teacher: graph of the dense model to learn from, or None.
        total_steps: length of the run.
        eval_every: steps between evaluations.
        stages: stages of the keep-ratio warm-up, at least one.
        schedule: learning rate by step.
        optimizer: follows that schedule.
        mesh: mesh of all devices.
        task: what is evaluated, and how.
    """

    config: RunConfig
    model: Model
    image_size: tuple[int, int]
    teacher: nnx.GraphDef[Any] | None
    total_steps: int
    eval_every: int
    stages: tuple[Stage, ...]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh
    task: Task

    @property
    def by_image(self) -> NamedSharding:
        """Sharding of a batch: its rows over all devices."""
        return by_image(self.mesh)

    def graph(self, reduction: Reduction) -> nnx.GraphDef[Any]:
        """Returns the graph of the model with another reduction, such as a warm-up stage's."""
        return nnx.graphdef(build_abstract_model(self.config.model, reduction))

    def first_state(self, weights: Weights) -> TrainState:
        """Returns the state before the first step, laid out over the mesh (`top_jax.sharding.in_parts`).

        Args:
            weights: all of the model's, the same in every process.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_layout())
        # As NumPy arrays: with several processes, a compiled function takes no JAX arrays that belong to one process.
        return jax.jit(self._create_state, out_shardings=shardings)(jax.device_get(weights))

    def state_layout(self) -> Any:
        """Returns the state's shapes, dtypes and shardings, to restore a checkpoint into."""
        shapes = jax.eval_shape(self._create_state, abstract_weights(self.config.model))
        place = lambda a, on: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on)  # noqa: E731
        return jax.tree.map(place, shapes, in_parts(self.mesh, shapes))

    def _create_state(self, weights: Weights) -> TrainState:
        params, stats = split_weights(weights, like=statistics_of(self.model))
        with_ema = self.config.optimizer.ema_decay is not None
        return create_state(params, stats, self.optimizer, seed=self.config.seed, with_ema=with_ema)


def make_plan(config: RunConfig, num_images: int) -> Plan:
    """Derives a run's steps from its config.

    Args:
        config: the run's config.
        num_images: images in an epoch.

    Raises:
        InputError: settings that do not fit together, or do not fit the devices.
    """
    check_divisible("batch_size", config.batch_size, config.optimizer.accumulate)
    check_divisible("eval_batch_size", config.eval_batch_size or config.batch_size)
    mesh = make_mesh(config.fsdp)
    steps_per_epoch = num_images / config.batch_size
    length = config.total_steps or config.epochs * steps_per_epoch
    if length > LARGEST_COUNT:
        raise InputError(
            f"{'total_steps' if config.total_steps else 'epochs'} makes a run of {length:.3g} steps; needed: at most "
            f"{LARGEST_COUNT:,}."
        )
    total_steps = max(1, round(length))
    schedule = learning_rate_schedule(
        config.optimizer, batch_size=config.batch_size, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    reduction = build_reduction(config.pruning)
    model = build_abstract_model(config.model, reduction)
    sizes = backbone_of(model).config
    return Plan(
        config=config,
        model=model,
        image_size=crop_size(config),
        teacher=None if config.distillation.teacher is None else nnx.graphdef(build_abstract_model(config.model)),
        total_steps=total_steps,
        eval_every=max(1, round(config.eval_every_epochs * steps_per_epoch)),
        stages=stages(
            reduction,
            config.pruning,
            num_patches=sizes.num_patches,
            depth=sizes.depth,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        ),
        schedule=schedule,
        optimizer=optimizer,
        mesh=mesh,
        task=task_of(config.model),
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that can be claimed and started: its inputs are read and checked, and nothing is written.

    Attributes:
        run: its directory.
        plan: its steps.
        train_source: images to train on.
        eval_source: images to evaluate.
        first_weights: its initial weights; None if its directory holds a checkpoint to continue from.
        teacher_weights: weights of the dense model to learn from, or None.
    """

    run: RunDirectory
    plan: Plan
    train_source: Source
    eval_source: Source
    first_weights: Weights | None
    teacher_weights: Weights | None

    @property
    def data(self) -> DataFacts:
        """Content of the run's data.json."""
        return _data_facts(self.train_source, self.eval_source)

    def train_batches(self) -> Batches:
        """Returns the stream of training batches, from its beginning."""
        config = self.plan.config
        return train_batches(
            self.train_source,
            config.data,
            augment=config.augment,
            img_size=self.plan.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_batches(self) -> Batches:
        """Returns the batches of one pass over the evaluation split."""
        config = self.plan.config
        return eval_batches(
            self.eval_source,
            config.data,
            img_size=self.plan.image_size,
            batch_size=config.eval_batch_size or config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            rows_multiple=len(jax.devices()),
        )

    def claim(self) -> None:
        """Claims the directory for this run, and saves a copy of the teacher in it; the lock must be held."""
        with distributed.together():
            self.run.claim(self.plan.config, self.data)
        self.run.remember_place()
        if self.teacher_weights is not None:
            keep_teacher(self.run, self.teacher_weights)

    def start(self, checkpoints: Checkpoints) -> tuple[TrainState, Position]:
        """Returns the newest checkpoint, or the state and position before the first step."""
        if restored := checkpoints.restore(self.plan.state_layout()):
            return restored
        # None if the checkpoints were removed after `prepare`
        weights = self.first_weights or initial_weights(self.plan.config, self.train_source.class_names)
        return self.plan.first_state(weights), {"batches": 0, "skipped": [], "evaluated": 1}


def prepare(config: RunConfig, run: RunDirectory) -> Prepared:
    """Reads and checks all that a run needs; writes nothing.

    With several processes each calls this; what must be equal in all of them is compared.

    Raises:
        InputError: bad input: settings, data, weights, or a directory that holds another run.
        RunError: a checkpoint among the inputs is damaged.
    """
    # A host may keep its data elsewhere and read it in its own way.
    of_the_host = ("data.data_dir", "data.num_workers", "data.num_threads")
    settings = {key: value for key, value in flatten_dict(config.to_dict(), sep=".").items() if key not in of_the_host}
    distributed.check_same({"workdir": str(run.path), **settings})
    train_source, eval_source = (open_split(config, train=train) for train in (True, False))
    data = _data_facts(train_source, eval_source)
    counts = {"images to train on": data["train"]["images"], "images to evaluate": data["eval"]["images"]}
    distributed.check_same({**counts, "class names": tuple(data["class_names"])})
    if config.optimizer.freeze_backbone and config.init_from is None:
        raise InputError(
            "config.optimizer.freeze_backbone needs config.init_from: it would train a classifier on random features; "
            "set --config.init_from=RUN_OR_FILE."
        )
    plan = make_plan(config, num_images=len(train_source))
    if is_dense(eval_source):
        SegmentationReader(eval_source, config.data, plan.image_size).check_sizes()
    run.check_same_run(config, data)
    prepared = Prepared(
        run=run,
        plan=plan,
        train_source=train_source,
        eval_source=eval_source,
        first_weights=None if run.has_checkpoints("latest") else initial_weights(config, train_source.class_names),
        teacher_weights=teacher_weights(run, config, train_source.class_names),
    )
    prepared.train_batches()  # reads nothing yet, but checks the settings
    prepared.eval_batches()
    return prepared


def open_split(config: RunConfig, *, train: bool, advice: str | None = None) -> Source:
    """Opens a split of the config's data.

    Args:
        config: the run's config.
        train: whether it is the split to train on, or the one to evaluate.
        advice: what to do if the split has another number of classes than the model, for the message; None advises to
            change the model's.

    Raises:
        InputError: the data is not there, or its labels or classes do not fit the model.
    """
    source = open_source(config.data, train=train)
    _check_labels(source, config)
    check_classes(source, config.model.num_classes, advice or f"set --config.model.num_classes={source.num_classes}")
    return source


def _check_labels(source: Source, config: RunConfig) -> None:
    """Raises InputError unless data and model both label images, or both label pixels."""
    if is_dense(source) == config.model.is_segmenter:
        return
    labels, head = ("pixels", "uper") if is_dense(source) else ("images", "linear")
    kind = "a segmenter" if config.model.is_segmenter else "a classifier"
    raise InputError(
        f"{source.name} labels {labels}, and config.model.head={config.model.head} is {kind}; choose other data "
        f"(config.data.source), or set --config.model.head={head}."
    )


def _data_facts(train: Source, evaluation: Source) -> DataFacts:
    about = {
        key: {"name": source.name, "images": len(source)} for key, source in (("train", train), ("eval", evaluation))
    }
    return {**about, "class_names": list(train.class_names)}
