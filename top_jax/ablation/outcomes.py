"""Results of an evaluation for each image, and the numbers computed from them: what differs between the tasks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from top_jax.ablation.results import Row, to_bits, to_text
from top_jax.build import Model
from top_jax.config import DataConfig, ModelConfig
from top_jax.data import normalize
from top_jax.evaluation.segmentation import image_areas, make_predict, numbers

Merge = Callable[[Any], Any]
"""Makes the model, in eval mode, from its weights and the chosen ranking."""
Step = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
"""Takes the arguments of `Merge` and a batch; returns arrays with a leading axis of images."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Functions that compute the results of a task.

    Attributes:
        make_step: builds the evaluation step from a model (shapes are enough), `Merge` and the data settings.
        fields: computes the numbers of a row from the step's arrays over all images.
    """

    make_step: Callable[[Model, Merge, DataConfig], Step]
    fields: Callable[[dict[str, np.ndarray]], Row]


def outcome_of(config: ModelConfig) -> Outcome:
    """Returns the outcome of the task that a model of these settings is for."""
    return SEGMENTATION if config.is_segmenter else CLASSIFICATION


def _classifies(_: Model, merge: Merge, data: DataConfig) -> Step:
    """Returns for each image whether the largest logit (the first of equal ones) is the label's, and the loss."""

    @jax.jit
    def step(state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = merge(state)(normalize(batch["image"], data.mean, data.std))
        best = jnp.argmax(logits, axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"correct": (best == batch["label"]).astype(jnp.int32), "loss": loss}

    return step


def _of_classes(found: dict[str, np.ndarray]) -> Row:
    correct = found["correct"].astype(bool)
    return {
        "accuracy": float(np.mean(correct)),
        "correct": int(np.sum(correct)),
        "loss": float(np.mean(found["loss"], dtype=np.float64)),
        "correct_bits": to_bits(correct),
    }


def _segments(model: Any, merge: Merge, _: DataConfig) -> Step:
    """Returns the areas of the classes in each normalised image, as `evaluate` counts them."""
    predict = make_predict(model, merge)
    count = jax.jit(functools.partial(image_areas, num_classes=model.num_classes))

    def step(state: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        label = batch["label"]
        return count(predict(state, batch["image"], (label.shape[1], label.shape[2])), label, batch["mask"])

    return step


def _of_areas(found: dict[str, np.ndarray]) -> Row:
    sums = {name: np.sum(areas, axis=0, dtype=np.int64) for name, areas in found.items()}
    areas = {name: area.tolist() for name, area in sums.items()}
    return {**numbers(sums), "areas": areas, "miou_of_images": to_text(miou_of_images(found))}


def miou_of_images(areas: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float64 `[images]` whose mean is the mIoU and whose standard error is the mIoU's.

    The mIoU is not a mean over images, because a class's areas are summed over all images before they are divided. Its
    linear approximation is. An image with intersection I and union U in class c has the value
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


CLASSIFICATION: Final = Outcome(_classifies, _of_classes)
SEGMENTATION: Final = Outcome(_segments, _of_areas)
