"""Evaluates a segmenter: pixel counts per class over a whole split, and their IoU, mean and pixel accuracy.

The pixels of all images are counted together, at the size of the labels. Ignored ones (255) do not count. A class that
occurs neither in labels nor in predictions does not count in a mean.

Source: mmseg 0.29.1, core/evaluation/metrics.py (`total_intersect_and_union`, `mean_iou`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from top_jax.config import DataConfig
from top_jax.data import DeviceBatch, Source
from top_jax.evaluation.accuracy import evaluate_source, images_of
from top_jax.models import Segmenter, sliding
from top_jax.models.weights import Weights, weights_of
from top_jax.typing import Array, Float, Images, Int, PixelLabels

logger = logging.getLogger(__name__)


def make_eval_step(model: Segmenter) -> Callable[[Weights, DeviceBatch], dict[str, jax.Array]]:
    """Builds `eval_step(weights, batch)`, which counts pixels of the normalised images with mask 1.

    Args:
        model: a segmenter, with weights or only their shapes.

    Returns:
        A function that returns float32 scalars count and unreadable (images), and int32 `[classes]`: `intersection`,
        `predicted` and `labelled`, in pixels.
    """
    predict = make_predict(model)
    count = jax.jit(functools.partial(areas, num_classes=model.num_classes))

    def eval_step(weights: Weights, batch: DeviceBatch) -> dict[str, jax.Array]:
        label = batch["label"]
        return count(
            predict(weights, batch["image"], (label.shape[1], label.shape[2])), label, batch["mask"], batch["index"]
        )

    return eval_step


def make_predict(
    model: Segmenter, merge: Callable[[Any], Segmenter] | None = None
) -> Callable[[Any, Images, tuple[int, int]], PixelLabels]:
    """Builds `predict(weights, images, size)`, which returns int32 labels `[B, *size]` of normalised images.

    Slide inference compiles the model once, for its windows, however many sizes the images have; only the step from the
    windows' logits to labels is compiled for each size. Whole inference compiles the model for each size of the images.

    Args:
        model: a segmenter, with weights or only their shapes.
        merge: builds the model, in eval mode, from the `weights` argument of `predict`; None if that holds its weights.
    """
    stride, own_size = model.slide_stride, model.config.backbone.img_size
    slides = model.inference == "slide"
    merge = merge or functools.partial(_merged, nnx.graphdef(model))

    @jax.jit
    def logits_of(weights: Any, images: Images) -> jax.Array:
        return merge(weights).logits(images)[0]

    cut = jax.jit(sliding.cut_windows, static_argnums=(1, 2))
    label = jax.jit(sliding.labels_of_windows, static_argnums=(1, 2, 3, 4))

    def predict(weights: Any, images: Images, size: tuple[int, int]) -> Int[Array, "B h w"]:
        image_size = (images.shape[1], images.shape[2])
        crop = own_size if slides else image_size
        logits = [logits_of(weights, window) for window in cut(images, crop, stride)]
        return label(logits, image_size, crop, stride, (size[0], size[1]))

    return predict


def _merged(graphdef: nnx.GraphDef[Any], weights: Weights) -> Segmenter:
    model = nnx.merge(graphdef, weights)
    model.eval()
    return model


def evaluate_segmenter(
    model: Segmenter,
    source: Source,
    data: DataConfig,
    *,
    crop_size: tuple[int, int],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Evaluates a segmenter on a whole source, on all devices.

    Args:
        model: with weights.
        source: images with labelled pixels.
        data: how images become input.
        crop_size: (height, width) of a training crop; it bounds the pixels of a batch.
        batch_size: largest number of images in a batch.
        on_batch: called after each batch with its number of images.

    Returns:
        What `accuracy.evaluate` and `numbers` return, and `classes`: for each class its name, iou, accuracy (None for
        one that does not occur) and share of the labelled pixels.

    Raises:
        InputError: the source has a different number of classes, or the batch size is not divisible by the devices.
    """
    return evaluate_source(
        weights_of(model),
        make_eval_step(model),
        source,
        data,
        num_classes=model.num_classes,
        img_size=crop_size,
        batch_size=batch_size,
        on_batch=on_batch,
        summarize=lambda sums: {**numbers(sums), "classes": per_class(sums, source.class_names)},
    )


def per_class(sums: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns name, iou, accuracy and share of the labelled pixels of each class; None for what is not defined."""
    columns = (iou(sums), class_accuracy(sums), sums["labelled"] / max(1, np.sum(sums["labelled"])))
    rows = zip(names, *columns, strict=True)

    def known(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return [{"name": name, "iou": known(a), "accuracy": known(b), "share": float(c)} for name, a, b, c in rows]


def areas(
    prediction: PixelLabels,
    label: PixelLabels,
    mask: Float[Array, " B"],
    index: Int[Array, " B"],
    *,
    num_classes: int,
) -> dict[str, jax.Array]:
    """Counts pixels as `make_eval_step`'s function does, for predicted classes."""
    of_images = image_areas(prediction, label, mask, num_classes=num_classes)
    return {
        **{name: jnp.sum(area, axis=0) for name, area in of_images.items()},
        **images_of(mask, index),
    }


def image_areas(
    prediction: PixelLabels, label: PixelLabels, mask: Float[Array, " B"], *, num_classes: int
) -> dict[str, Int[Array, "B classes"]]:
    """Returns `intersection`, `predicted` and `labelled` of each image in pixels: 0 for those with mask 0."""
    label = label.astype(jnp.int32)
    counted = (label < num_classes) & (mask[:, None, None] > 0)

    def area(classes: jax.Array, where: jax.Array) -> jax.Array:
        found = jnp.where(where, classes, num_classes).reshape(len(classes), -1)
        return jax.vmap(lambda row: jnp.bincount(row, length=num_classes + 1))(found)[:, :num_classes]

    return {
        "intersection": area(label, counted & (prediction == label)),
        "predicted": area(prediction, counted),
        "labelled": area(label, counted),
    }


def numbers(sums: dict[str, Any]) -> dict[str, float]:
    """Returns miou, mean_accuracy and pixel_accuracy (shares) of summed areas; 0, and a warning, without labels."""
    ious, accuracies = iou(sums), class_accuracy(sums)
    labelled = np.sum(sums["labelled"])
    if not labelled:
        logger.warning("no pixel of the images to evaluate is labelled: an mIoU of 0 does not describe the model")
    return {
        "miou": _mean(ious),
        "mean_accuracy": _mean(accuracies),
        "pixel_accuracy": float(np.sum(sums["intersection"]) / labelled) if labelled else 0.0,
    }


def iou(sums: dict[str, Any]) -> np.ndarray:
    """Returns intersection over union of each class, float64 `[classes]`; nan for a class that does not occur."""
    intersection, predicted, labelled = (np.asarray(sums[n]) for n in ("intersection", "predicted", "labelled"))
    return _ratio(intersection, predicted + labelled - intersection)


def class_accuracy(sums: dict[str, Any]) -> np.ndarray:
    """Returns the share of each class's pixels that are predicted correctly; nan for a class that no label has."""
    return _ratio(np.asarray(sums["intersection"]), np.asarray(sums["labelled"]))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else 0.0
