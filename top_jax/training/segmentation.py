"""The loss of a segmenter: cross entropy of logits that are resized to the label, by rows, with its own gradient.

Resized logits of a whole batch, [B, H, W, classes] in float32, would be the largest array of a training step: 2.5 GB
for 16 images of 512 x 512 pixels and 150 classes. Automatic differentiation would keep several of them. Here each pass
computes them for a few rows of every image at a time, so that a batch that is split over devices stays split.

Source: mmseg 0.29.1, decode_head.py (`losses`) and cross_entropy_loss.py with avg_non_ignore=False: the mean over all
pixels, ignored ones counting as zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from top_jax.data import IGNORED
from top_jax.models.resizing import bilinear_matrix, combined, taps_by_rows, taps_of
from top_jax.typing import Array, Float, Images, PixelLabels

Maps = Float[Array, "B h w classes"]


class PixelLoss(NamedTuple):
    """Loss of each image, and shares of its pixels, float32 `[B]` each.

    Attributes:
        loss: mean cross entropy over all pixels, in nats; ignored pixels count as zero.
        correct: share of the pixels whose class has the largest logit.
        labelled: share of the pixels that are not ignored.
    """

    loss: Float[Array, " B"]
    correct: Float[Array, " B"]
    labelled: Float[Array, " B"]


def losses(model: Any, images: Images, label: PixelLabels, keys: Any, aux_weight: float) -> dict[str, Any]:
    """Returns the parts of a training step's loss, each float32 `[B]`.

    Args:
        model: a `Segmenter`, in the mode in which it trains.
        images: normalised.
        label: class of each pixel; `IGNORED` where there is none.
        keys: `[B]` PRNG keys, for drop-path and dropout.
        aux_weight: weight of the auxiliary head's loss.

    Returns:
        `loss`, which is minimised; `auxiliary_loss`, before it is weighted, if the model has an auxiliary head; and
        `correct` and `labelled` (see `PixelLoss`) of the decode head.
    """
    decode, auxiliary = model.logits(images, keys)
    found = pixel_loss(decode, label)
    parts = {"loss": found.loss, "correct": found.correct, "labelled": found.labelled}
    if auxiliary is not None:
        parts["auxiliary_loss"] = pixel_loss(auxiliary, label).loss
        parts["loss"] = parts["loss"] + aux_weight * parts["auxiliary_loss"]
    return parts


def shares(sums: dict[str, Any]) -> dict[str, Any]:
    """Returns a step's metrics: `pixel_accuracy`, over the labelled pixels, replaces the counts of `losses`."""
    if "labelled" not in sums:
        return sums
    accuracy = sums["correct"] / jnp.maximum(sums["labelled"], 1e-12)
    return {name: value for name, value in sums.items() if name not in ("correct", "labelled")} | {
        "pixel_accuracy": accuracy
    }


def pixel_loss(logits: Maps, label: PixelLabels) -> PixelLoss:
    """Returns the loss of logits, resized to the label's size (bilinear, half-pixel centres).

    Only `loss` has a gradient. An image without a labelled pixel has the loss 0.

    Args:
        logits: float32, of any smaller or larger size than the label.
        label: integers; `IGNORED`, and any other value that is not a class, is ignored.
    """
    return PixelLoss(*_pixel_loss(logits, label))


@jax.custom_vjp
def _pixel_loss(logits: Maps, label: PixelLabels) -> tuple[jax.Array, jax.Array, jax.Array]:
    chunks, pixels = _chunks(logits, label), label.shape[1] * label.shape[2]

    def add(sums: Any, chunk: _Chunk) -> tuple[Any, None]:
        resized, is_class, counted = _resized(logits, chunk)
        entropy = jax.nn.logsumexp(resized, axis=-1) - jnp.sum(jnp.where(is_class, resized, 0.0), axis=-1)
        correct = jnp.argmax(resized, axis=-1) == chunk.label
        new = (jnp.where(counted, entropy, 0.0), correct & counted, counted)
        return tuple(s + jnp.sum(n, axis=(1, 2), dtype=jnp.float32) for s, n in zip(sums, new, strict=True)), None

    sums, _ = jax.lax.scan(add, (jnp.zeros(len(logits), jnp.float32),) * 3, chunks)
    loss, correct, labelled = (total / pixels for total in sums)
    return loss, correct, labelled


def _forward(logits: Maps, label: PixelLabels) -> tuple[Any, Any]:
    return _pixel_loss(logits, label), (logits, label)


def _backward(saved: Any, cotangents: Any) -> tuple[Maps, None]:
    """Returns the gradient: softmax minus one-hot of each pixel, summed over the pixels that a logit is part of."""
    logits, label = saved
    height, width = label.shape[1:]
    weight = (cotangents[0] / (height * width))[:, None, None, None]
    columns = taps_of(bilinear_matrix(logits.shape[2], width).T)

    def gradient(_: None, chunk: _Chunk) -> tuple[None, jax.Array]:
        resized, is_class, counted = _resized(logits, chunk)
        slope = jnp.where(counted[..., None], jax.nn.softmax(resized, axis=-1) - is_class, 0.0)
        return None, combined(slope * weight, *columns, axis=2)

    _, narrow = jax.lax.scan(gradient, None, _chunks(logits, label))  # [chunks, B, rows, w, classes]
    narrow = jnp.moveaxis(narrow, 0, 1).reshape(len(logits), -1, *narrow.shape[3:])[:, :height]
    return combined(narrow, *taps_of(bilinear_matrix(logits.shape[1], height).T), axis=1), None


_pixel_loss.defvjp(_forward, _backward)


class _Chunk(NamedTuple):
    """Some rows of the label, and the rows of the logits from which theirs are interpolated."""

    places: jax.Array  # int32 [rows, taps]
    shares: jax.Array  # float32 [rows, taps]
    label: jax.Array  # int32 [B, rows, W]


def _chunks(logits: Maps, label: PixelLabels) -> _Chunk:
    """Returns the label in chunks of some rows, on a new first axis; the last one is padded with ignored pixels."""
    batch, height, width = label.shape
    places, shares = taps_by_rows(bilinear_matrix(logits.shape[1], height))
    chunks, rows = places.shape[:2]
    missing = ((0, 0), (0, chunks * rows - height), (0, 0))
    label = jnp.pad(label.astype(jnp.int32), missing, constant_values=IGNORED)
    return _Chunk(places, shares, jnp.moveaxis(label.reshape(batch, chunks, rows, width), 1, 0))


def _resized(logits: Maps, chunk: _Chunk) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the logits of a chunk's pixels, whether a class is a pixel's own, and whether a pixel is counted."""
    rows = combined(logits, chunk.places, chunk.shares, axis=1)
    resized = combined(rows, *taps_of(bilinear_matrix(logits.shape[2], chunk.label.shape[2])), axis=2)
    label, classes = chunk.label, jnp.arange(logits.shape[-1])
    return resized, label[..., None] == classes, (label != IGNORED) & (label >= 0) & (label < len(classes))
