"""One compiled program for all scores: compiling is most of the time that an ablation of a small model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from top_jax.config import DataConfig
from top_jax.data import PADDING_INDEX, Source, eval_batches, normalize, prefetch_to_device
from top_jax.data.sources import Record
from top_jax.errors import InputError
from top_jax.models.weights import Weights
from top_jax.pruning import Cut, Evidence, Pruning, Tokens
from top_jax.pruning.score import token_scores
from top_jax.sharding import by_image, check_divisible, make_mesh
from top_jax.typing import Array, Float, Int, Slots, SlotScores


class Ranking(NamedTuple):
    """Of a setting, what a program takes as an argument.

    Attributes:
        ranking: int32, which of the program's rankings.
        best_first: bool, order="score".
    """

    ranking: Any
    best_first: Any


class Outcome(NamedTuple):
    """Of each image of a batch, whether the class of largest logit (the first of equals) is right, and the loss."""

    correct: Int[Array, " B"]
    loss: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selectable(Pruning):
    """`Pruning` whose score and order are chosen when it runs.

    Attributes:
        rankings: (score, seed) of each that there is.
        choice: of one, as traced arrays.
    """

    rankings: tuple[tuple[str, int], ...]
    choice: Ranking

    def scores(self, tokens: Tokens, evidence: Evidence, cut: Cut) -> SlotScores:
        """Those of the chosen ranking; all are computed."""
        slots = tokens.patch_slots()
        of_each = [
            token_scores(score, evidence, tokens.positions, slots, keep=cut.kept, seed=seed, block=cut.block)
            for score, seed in self.rankings
        ]
        return jnp.take(jnp.stack(of_each), self.choice.ranking, axis=0)

    def arranged(self, best: Slots) -> Slots:
        """As the choice says."""
        return jnp.where(self.choice.best_first, best, jnp.sort(best, axis=1))


class Program:
    """Classifies batches under any of some settings that differ in score, order and seed alone.

    Args:
        graphdef: of the model, pruned by any of them.
        settings: at least one.
        data: how pixels are normalised.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], settings: Sequence[Pruning], data: DataConfig):
        self._rankings = tuple(dict.fromkeys((setting.score, setting.seed) for setting in settings))
        self._step = _make_step(graphdef, settings[0], self._rankings, data)

    def __call__(self, setting: Pruning, weights: Weights, batch: dict[str, jax.Array]) -> Outcome:
        """Of one batch; compiles at the first."""
        ranking = self._rankings.index((setting.score, setting.seed))
        return self._step(weights, batch, Ranking(jnp.int32(ranking), jnp.bool_(setting.order == "score")))


def _make_step(
    graphdef: nnx.GraphDef[Any], like: Pruning, rankings: tuple[tuple[str, int], ...], data: DataConfig
) -> Callable[[Weights, dict[str, jax.Array], Ranking], Outcome]:
    @jax.jit
    def step(weights: Weights, batch: dict[str, jax.Array], choice: Ranking) -> Outcome:
        model = nnx.merge(graphdef, weights)
        model.eval()
        model.reduction = Selectable(
            after_blocks=like.after_blocks,
            keep_ratio=like.keep_ratio,
            alignment=like.alignment,
            rankings=rankings,
            choice=choice,
        )
        logits = model(normalize(batch["image"], data.mean, data.std))
        best = jnp.argmax(logits, axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return Outcome((best == batch["label"]).astype(jnp.int32), loss)

    return step


HELD_BYTES: Final = 2_000_000_000  # of pixels, uint8, kept on the devices; beyond, each setting reads them anew

DeviceBatch = dict[str, jax.Array]


class Images:
    """Batches of a split, as often as they are iterated over.

    Args:
        source: the evaluation split.
        data: how it is cropped and read.
        img_size: (height, width) of the model's input.
        batch_size: over all devices.
        limit: only the first so many images; None takes all.

    Attributes:
        count: images, unreadable ones included.
        held: whether they are read once.

    Raises:
        InputError: a limit that is not there, or a batch size that does not split over the devices.
    """

    def __init__(
        self, source: Source, data: DataConfig, *, img_size: tuple[int, int], batch_size: int, limit: int | None
    ):
        if limit is not None and not 1 <= limit <= len(source):
            raise InputError(f"limit_images={limit}; needed: 1 .. {len(source)}, what {source.name} has.")
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
    """The first images of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, count
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Record:
        return self._source[index]

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def counted(batch: DeviceBatch) -> np.ndarray:
    """bool [B]: rows that count."""
    return np.asarray(batch["mask"]) > 0


def left_out(batch: DeviceBatch) -> list[int]:
    """Indices of images that cannot be read."""
    index = np.asarray(batch["index"])
    return index[~counted(batch) & (index != PADDING_INDEX)].tolist()
