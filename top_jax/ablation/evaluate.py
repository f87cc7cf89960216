"""Evaluates settings: images are decoded once, and settings that differ in score, order or seed share a program.

Most of the time that an ablation of a small model takes is spent on compiling. The results are kept image by image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from top_jax.ablation.results import Row, to_bits, to_text
from top_jax.build import Model, backbone_of
from top_jax.config import DataConfig
from top_jax.data import (
    PADDING_INDEX,
    DeviceBatch,
    Source,
    eval_batches,
    is_dense,
    normalize,
    prefetch_to_device,
)
from top_jax.data.sources import Record
from top_jax.errors import InputError
from top_jax.evaluation.segmentation import image_areas, make_predict, numbers
from top_jax.models import Segmenter
from top_jax.models.weights import Weights
from top_jax.pruning import Cut, Evidence, Pruning, Tokens
from top_jax.pruning.score import token_scores
from top_jax.sharding import by_image, check_divisible, make_mesh, replicated
from top_jax.typing import Slots, SlotScores

HELD_BYTES: Final = 2_000_000_000  # larger sets of batches are read again for each setting

Step = Callable[[Any, DeviceBatch], DeviceBatch]
"""Takes the weights with the chosen ranking, and a batch; returns arrays with a leading axis of images."""


class EvaluationImages:
    """The batches of an evaluation split; they can be iterated over any number of times.

    Args:
        source: the evaluation split.
        data: how images are read and cropped.
        img_size: (height, width) of the model's input; for a segmenter, of a training crop (`evaluate_segmenter`).
        batch_size: images per batch, over all devices.
        limit: use only the first `limit` images; None for all.

    Attributes:
        class_names: names of the classes, in the order of the labels.
        count: number of images, unreadable ones included.
        held: whether the images are read once and kept on the devices; the first pass finds out whether they fit.

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
        self._source = _FirstDense(source, self.count) if is_dense(source) else _First(source, self.count)
        self._data, self._img_size, self._batch_size = data, img_size, batch_size
        self.held = True
        self._batches: list[DeviceBatch] | None = None

    def __iter__(self) -> Iterator[DeviceBatch]:
        if self._batches is not None:
            yield from self._batches
            return
        kept, size = [], 0
        for batch in self._read():
            size += sum(array.nbytes for array in batch.values())
            if self.held and size > HELD_BYTES:
                logging.warning("the images do not fit in memory: each setting reads them again")
                self.held = False
                kept.clear()
            if self.held:
                kept.append(batch)
            yield batch
        self._batches = kept if self.held else None

    def _read(self) -> Iterator[DeviceBatch]:
        sizes = {"img_size": self._img_size, "batch_size": self._batch_size, "rows_multiple": len(jax.devices())}
        with eval_batches(self._source, self._data, **sizes) as batches:
            for batch, _ in prefetch_to_device(batches, by_image(make_mesh()), self._data.prefetch):
                yield batch


class _First:
    """The first `count` images of a source, as a source."""

    def __init__(self, source: Any, count: int):
        self._source, self._count = source, count
        self.name, self.num_classes, self.class_names = source.name, source.num_classes, source.class_names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Record:
        return self._source[index]

    def describe(self, index: int) -> str:
        return self._source.describe(index)


class _FirstDense(_First):
    """The first `count` images of a `DenseSource`, as a source."""

    def describe_labels(self, index: int, /) -> str:
        return self._source.describe_labels(index)

    def label_size(self, index: int, /) -> tuple[int, int]:
        return self._source.label_size(index)


class Ranking(NamedTuple):
    """Ranking and order of tokens: the arguments that select a setting in a shared program.

    Attributes:
        index: int32, index into the program's list of rankings.
        best_first: bool, whether the kept tokens stay in the order of their scores (`order="score"`).
    """

    index: Any
    best_first: Any


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
    """A compiled program that evaluates batches under settings that differ only in score, order and seed.

    Args:
        model: with weights or only their shapes; pruned by any of the settings.
        settings: the settings to choose from, at least one.
        data: how pixels are normalised.
    """

    def __init__(self, model: Model, settings: Sequence[Pruning], data: DataConfig):
        self._rankings = tuple(dict.fromkeys((setting.score, setting.seed) for setting in settings))
        merge = _merge(nnx.graphdef(model), settings[0], self._rankings)
        if isinstance(model, Segmenter):
            self._step, self._fields = _areas_step(model, merge), _area_fields
        else:
            self._step, self._fields = _class_step(merge, data), _class_fields

    def evaluate(self, setting: Pruning, weights: Weights, images: EvaluationImages) -> dict[str, Any]:
        """Evaluates one of the settings on all images; the first call compiles.

        Args:
            setting: how tokens are pruned.
            weights: weights of the model.
            images: the evaluation split.

        Returns:
            The fields of a row that hold its outcome: images, left_out, and those of the model's task (`Row`).

        Raises:
            InputError: no image could be read.
        """
        place = self._rankings.index((setting.score, setting.seed))
        chosen = Ranking(jnp.int32(place), jnp.bool_(setting.order == "score"))
        state = (jax.device_put(weights, replicated(make_mesh())), chosen)
        parts: dict[str, list[np.ndarray]] = {}
        for batch in images:
            found = {"index": batch["index"], "mask": batch["mask"], **self._step(state, batch)}
            for name, array in found.items():  # waits for the step, so that no steps pile up
                parts.setdefault(name, []).append(np.asarray(array))
        outcomes = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        index, counted = outcomes.pop("index"), outcomes.pop("mask") > 0
        if not counted.any():
            raise InputError(f"no image can be read ({images.count:,} tried); correct config.data, or the images.")
        left_out = sorted(index[~counted & (index != PADDING_INDEX)].tolist())
        order = np.argsort(index[counted])  # batches of label maps are grouped by the size of the image
        in_order = {name: array[counted][order] for name, array in outcomes.items()}
        return {"images": len(order), "left_out": left_out, **self._fields(in_order)}


def _merge(graphdef: nnx.GraphDef[Any], like: Pruning, rankings: tuple[tuple[str, int], ...]) -> Callable[[Any], Any]:
    """Returns a function that makes the model, in eval mode, from its weights and the chosen ranking."""

    def merge(state: tuple[Weights, Ranking]) -> Model:
        weights, chosen = state
        model = nnx.merge(graphdef, weights)
        model.eval()
        backbone_of(model).reduction = Selectable(
            after_blocks=like.after_blocks,
            keep_ratio=like.keep_ratio,
            alignment=like.alignment,
            rankings=rankings,
            chosen=chosen,
        )
        return model

    return merge


def _class_step(merge: Callable[[Any], Any], data: DataConfig) -> Step:
    """Returns a step that finds whether the largest logit (the first on a tie) is each image's label, and the loss."""

    @jax.jit
    def step(state: Any, batch: DeviceBatch) -> DeviceBatch:
        logits = merge(state)(normalize(batch["image"], data.mean, data.std))
        best = jnp.argmax(logits, axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"correct": (best == batch["label"]).astype(jnp.int32), "loss": loss}

    return step


def _class_fields(found: dict[str, np.ndarray]) -> Row:
    correct = found["correct"].astype(bool)
    return {
        "accuracy": float(np.mean(correct)),
        "correct": int(np.sum(correct)),
        "loss": float(np.mean(found["loss"], dtype=np.float64)),
        "correct_bits": to_bits(correct),
    }


def _areas_step(model: Segmenter, merge: Callable[[Any], Any]) -> Step:
    """Returns a step that counts the areas of the classes in each normalised image, as evaluation does."""
    predict = make_predict(model, merge)
    count = jax.jit(functools.partial(image_areas, num_classes=model.num_classes))

    def step(state: Any, batch: DeviceBatch) -> DeviceBatch:
        label = batch["label"]
        return count(predict(state, batch["image"], (label.shape[1], label.shape[2])), label, batch["mask"])

    return step


def _area_fields(found: dict[str, np.ndarray]) -> Row:
    sums = {name: np.sum(areas, axis=0, dtype=np.int64) for name, areas in found.items()}
    areas = {name: area.tolist() for name, area in sums.items()}
    return {**numbers(sums), "areas": areas, "miou_of_images": to_text(miou_of_images(found))}


def miou_of_images(areas: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float64 `[images]` whose mean is the mIoU and whose standard error is the mIoU's.

    The mIoU is not a mean over images, because a class's areas are summed over all images before they are divided. Its
    linear approximation is one. An image with intersection I and union U in class c has the value
    IoU_c + images (I - IoU_c U) / U_c, where U_c is the sum of all unions; averaged over the classes that occur.

    Source: linearised variance of a ratio, Woodruff, JASA 66 (1971).

    Args:
        areas: `intersection`, `predicted` and `labelled`, in pixels, each `[images, classes]`.
    """
    intersection, predicted, labelled = (areas[n].astype(np.float64) for n in ("intersection", "predicted", "labelled"))
    union = predicted + labelled - intersection
    there = union.sum(axis=0) > 0
    if not there.any():
        return np.zeros(len(union))
    intersection, union = intersection[:, there], union[:, there]
    total = union.sum(axis=0)
    ious = intersection.sum(axis=0) / total
    return np.mean(ious + len(union) * (intersection - ious * union) / total, axis=1)
