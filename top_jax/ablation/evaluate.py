"""Evaluates settings: images are decoded once, and settings that differ in score, order or seed share a program.

Most of the time that an ablation of a small model takes is spent on compiling.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax.ablation.results import to_bits
from top_jax.config import DataConfig
from top_jax.data import PADDING_INDEX, Source, eval_batches, normalize, prefetch_to_device
from top_jax.data.sources import Record
from top_jax.errors import InputError
from top_jax.models.weights import Weights
from top_jax.pruning import Cut, Evidence, Pruning, Tokens
from top_jax.pruning.score import token_scores
from top_jax.sharding import by_image, check_divisible, make_mesh, replicated
from top_jax.typing import Array, Float, Int, Slots, SlotScores

HELD_BYTES: Final = 2_000_000_000  # of pixels (uint8) kept on the devices; above, each setting reads the images again

DeviceBatch = dict[str, jax.Array]


class EvaluationImages:
    """The batches of an evaluation split; they can be iterated over any number of times.

    Args:
        source: the evaluation split.
        data: how images are read and cropped.
        img_size: (height, width) of the model's input.
        batch_size: images per batch, over all devices.
        limit: use only the first `limit` images; None for all.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        count: number of images, unreadable ones included.
        held: whether the images are read once and kept on the devices.

    Raises:
        InputError: a limit out of range, or a batch size that cannot be divided over the devices.
    """

    def __init__(
        self, source: Source, data: DataConfig, *, img_size: tuple[int, int], batch_size: int, limit: int | None
    ):
        if limit is not None and not 1 <= limit <= len(source):
            raise InputError(f"limit_images={limit}; needed: 1 to {len(source)}, the size of {source.name}.")
        self.class_names = source.class_names
        self.count = limit or len(source)
        batch_size = min(batch_size, self.count) if len(jax.devices()) == 1 else batch_size
        check_divisible("batch_size", batch_size)
        self._source = _First(source, self.count)
        self._data, self._img_size, self._batch_size = data, img_size, batch_size
        self.held = self.count * img_size[0] * img_size[1] * 3 <= HELD_BYTES
        self._batches: list[DeviceBatch] | None = None

    def __iter__(self) -> Iterator[DeviceBatch]:
        if not self.held:
            return self._read()
        if self._batches is None:
            self._batches = list(self._read())
        return iter(self._batches)

    def _read(self) -> Iterator[DeviceBatch]:
        with eval_batches(self._source, self._data, img_size=self._img_size, batch_size=self._batch_size) as batches:
            for batch, _ in prefetch_to_device(batches, by_image(make_mesh()), self._data.prefetch):
                yield batch


class _First:
    """The first `count` images of a source, as a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Record:
        return self._source[index]

    def describe(self, index: int) -> str:
        return self._source.describe(index)


class Ranking(NamedTuple):
    """How tokens are ranked and ordered: the arguments of a program that stand for a setting.

    Attributes:
        index: int32, index into the program's list of rankings.
        best_first: bool, whether the kept tokens stay in the order of their scores (`order="score"`).
    """

    index: Any
    best_first: Any


class Outcome(NamedTuple):
    """The outcome of each image of a batch.

    Attributes:
        correct: whether the class of the largest logit (the first one of equal logits) is the label, 1 or 0.
        loss: cross-entropy, in nats.
    """

    correct: Int[Array, " B"]
    loss: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selectable(Pruning):
    """A `Pruning` whose score, seed and order are chosen at run time.

    Attributes:
        rankings: the (score, seed) pairs to choose from.
        chosen: the choice, as traced arrays.
    """

    rankings: tuple[tuple[str, int], ...]
    chosen: Ranking

    def scores(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> SlotScores:
        """Returns the scores of the chosen ranking; those of all rankings are computed."""
        slots = tokens.patch_slots()
        of_each = [
            token_scores(score, evidence, tokens.positions, slots, keep=cut.kept, seed=seed, block=cut.block)
            for score, seed in self.rankings
        ]
        return jnp.take(jnp.stack(of_each), self.chosen.index, axis=0)

    def arranged(self, best: Slots) -> Slots:
        """Returns the kept slots in the chosen order."""
        return jnp.where(self.chosen.best_first, best, jnp.sort(best, axis=1))


class Program:
    """A compiled program that classifies batches under settings that differ only in score, order and seed.

    Args:
        graphdef: structure of the model, pruned by any of the settings.
        settings: the settings to choose from, at least one.
        data: how pixels are normalised.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], settings: Sequence[Pruning], data: DataConfig):
        self._rankings = tuple(dict.fromkeys((setting.score, setting.seed) for setting in settings))
        self._step = _make_step(graphdef, settings[0], self._rankings, data)

    def __call__(self, setting: Pruning, weights: Weights, batch: dict[str, jax.Array]) -> Outcome:
        """Classifies one batch; the first call compiles."""
        ranking = self._rankings.index((setting.score, setting.seed))
        return self._step(weights, batch, Ranking(jnp.int32(ranking), jnp.bool_(setting.order == "score")))


def _make_step(
    graphdef: nnx.GraphDef[Any], like: Pruning, rankings: tuple[tuple[str, int], ...], data: DataConfig
) -> Callable[[Weights, dict[str, jax.Array], Ranking], Outcome]:
    @jax.jit
    def step(weights: Weights, batch: dict[str, jax.Array], chosen: Ranking) -> Outcome:
        model = nnx.merge(graphdef, weights)
        model.eval()
        model.reduction = Selectable(
            after_blocks=like.after_blocks,
            keep_ratio=like.keep_ratio,
            alignment=like.alignment,
            rankings=rankings,
            chosen=chosen,
        )
        logits = model(normalize(batch["image"], data.mean, data.std))
        best = jnp.argmax(logits, axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return Outcome((best == batch["label"]).astype(jnp.int32), loss)

    return step


def evaluate(run: Program, setting: Pruning, weights: Weights, images: EvaluationImages) -> dict[str, Any]:
    """Evaluates a setting on all images.

    Args:
        run: a program that has the setting.
        setting: how tokens are pruned.
        weights: weights of the model.
        images: the evaluation split.

    Returns:
        The fields of a row that hold its outcome: accuracy, correct, images, loss, left_out, correct_bits.
    """
    weights = jax.device_put(weights, replicated(make_mesh()))
    outcomes = [(_counted(batch), _left_out(batch), run(setting, weights, batch)) for batch in images]
    correct = np.concatenate([np.asarray(outcome.correct)[mask] for mask, _, outcome in outcomes]).astype(bool)
    loss = np.concatenate([np.asarray(outcome.loss)[mask] for mask, _, outcome in outcomes])
    return {
        "accuracy": float(np.mean(correct)),
        "correct": int(np.sum(correct)),
        "images": len(correct),
        "loss": float(np.mean(loss, dtype=np.float64)),
        "left_out": list(itertools.chain.from_iterable(indices for _, indices, _ in outcomes)),
        "correct_bits": to_bits(correct),
    }


def _counted(batch: DeviceBatch) -> np.ndarray:
    """Returns which rows of a batch are images, not padding and not unreadable: bool `[B]`."""
    return np.asarray(batch["mask"]) > 0


def _left_out(batch: DeviceBatch) -> list[int]:
    """Returns the indices of images that cannot be read."""
    index = np.asarray(batch["index"])
    return index[~_counted(batch) & (index != PADDING_INDEX)].tolist()
