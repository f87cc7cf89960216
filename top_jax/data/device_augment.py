"""Augments a whole batch of training images on the device: pure functions, meant for use inside jit.

The order is timm's: flip, normalise, erase, mix. Each image's augmentation depends only on its own key, and mixing only
on the batch's key, so neither depends on how the batch is sharded. Every draw folds its own number into the key.

Source: timm 0.4.12, data/random_erasing.py and data/mixup.py; Random Erasing (arXiv 1708.04896), mixup (arXiv
1710.09412), CutMix (arXiv 1905.04899).
"""

from __future__ import annotations

import functools
from typing import Final

import jax
import jax.numpy as jnp
import optax

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data.transforms import Size, normalize

ERASING_TRIES: Final = 10
ERASED_AREAS: Final = (0.02, 1 / 3)
ERASED_ASPECT: Final = 0.3  # height / width, log-uniform between this and its inverse

FLIP, BOX, NOISE = range(3)  # the draws of an image, folded into its key
HOW, SHARE = range(2)  # the draws of a batch, folded into its key


def augment(
    batch: dict[str, jax.Array],
    keys: jax.Array,
    batch_key: jax.Array,
    config: AugmentConfig,
    data: DataConfig,
    *,
    num_classes: int,
    label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
    """Makes the model's input and targets from a batch: every augmentation of `config` that runs on the device.

    Args:
        batch: image uint8 `[B, H, W, 3]`, label int32 `[B]` and mask float32 `[B]`, as the pipeline makes them.
        keys: `[B]` PRNG keys, one per image.
        batch_key: PRNG key of the batch, for mixing.
        config: flip, erasing and mixing.
        data: mean and standard deviation of the pixels.
        num_classes: number of classes C.
        label_smoothing: share of each target that is spread evenly over the classes.

    Returns:
        float32 images `[B, H, W, 3]`, normalised, and float32 targets `[B, C]`, each summing to 1.
    """
    images = flip(batch["image"], keys) if config.flip else batch["image"]
    images = normalize(images, data.mean, data.std)
    if config.erasing:
        images = random_erasing(images, keys, config.erasing)
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), label_smoothing)
    if (config.mixup or config.cutmix) and config.mix_probability:
        images, targets, _ = mix(images, targets, batch["mask"], batch_key, config)
    return images, targets


def flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        images: `[B, H, W, 3]` of any dtype.
        keys: `[B]` PRNG keys.
    """
    mirrored = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, FLIP)))(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replaces a rectangle of some images by noise: timm's RandomErasing in its mode "pixel".

    The rectangle's share of the area is uniform in 0.02 .. 1/3, its height / width log-uniform in 0.3 .. 1/0.3. The
    first of ten such draws that is lower and narrower than the image is placed uniformly in it. If none is, the image
    stays unchanged.

    Args:
        images: float32 `[B, H, W, 3]`, normalised; the noise is standard normal, for each pixel and channel.
        keys: `[B]` PRNG keys.
        probability: probability that a rectangle of an image is replaced.
    """
    height, width = images.shape[1:3]
    rectangle = functools.partial(_rectangle, size=(height, width), probability=probability)
    top, left, high, wide = jax.vmap(rectangle)(keys)
    erased = _between(top, top + high, height)[:, :, None] & _between(left, left + wide, width)[:, None, :]
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, NOISE), images.shape[1:])  # noqa: E731
    return jnp.where(erased[..., None], jax.vmap(draw)(keys), images)


def mix(
    images: jax.Array, targets: jax.Array, mask: jax.Array, key: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies mixup or CutMix to images i and B - 1 - i: timm's Mixup in its mode "batch".

    The batch has one share lambda ~ Beta(alpha, alpha). Mixup adds lambda times the image and 1 - lambda times its
    partner. CutMix copies a box of the partner into the image, with sides `int(side * sqrt(1 - lambda))`, centred on a
    uniformly drawn pixel. The box is clipped to the image, and lambda becomes the share of the image's own pixels.
    Targets are mixed by lambda.

    A row with mask 0 holds no image: neither it nor its partner is mixed.

    Args:
        images: float32 `[B, H, W, 3]`.
        targets: float32 `[B, C]`.
        mask: float32 `[B]`, 0 for a row that holds no image.
        key: PRNG key of the batch.
        config: the alphas (at least one above 0), `mix_probability` (that the batch is mixed at all), and
            `switch_probability` (that it is CutMix, if both alphas are above 0).

    Returns:
        images and targets, and float32 `[B]`, each row's own share: lambda, or 1.
    """
    share, own = _shares(key, (images.shape[1], images.shape[2]), config)
    alone = (mask == 0) | (mask[::-1] == 0)
    share = jnp.where(alone, 1.0, share)
    own = jnp.where(alone[:, None, None], 1.0, own)[..., None]
    images = images * own + images[::-1] * (1 - own)
    targets = targets * share[:, None] + targets[::-1] * (1 - share[:, None])
    return images, targets, share


def _shares(key: jax.Array, size: Size, config: AugmentConfig) -> tuple[jax.Array, jax.Array]:
    """Draws each image's own share: float32, for the targets, and float32 `[H, W]`, for each pixel."""
    mixed, cut, row, column = jax.random.uniform(jax.random.fold_in(key, HOW), (4,))
    cut = cut < (config.switch_probability if config.mixup and config.cutmix else float(config.cutmix > 0))
    alpha = jnp.where(cut, config.cutmix, config.mixup)
    share = jax.random.beta(jax.random.fold_in(key, SHARE), alpha, alpha)
    share = jnp.where(mixed < config.mix_probability, share, 1.0)
    inside = [_box_side(center, share, side) for center, side in zip((row, column), size, strict=True)]
    outside = 1.0 - (inside[0][:, None] & inside[1][None, :])
    return jnp.where(cut, jnp.mean(outside), share), jnp.where(cut, outside, share)


def _box_side(center: jax.Array, share: jax.Array, side: int) -> jax.Array:
    """Returns bool `[side]`, the pixels of a CutMix box along one side; `center` in [0, 1) is relative to the side."""
    half = (side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    pixel = _floor(center * side)
    return _between(pixel - half, pixel + half, side)


def _rectangle(key: jax.Array, size: Size, probability: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Draws top, left, height and width of the rectangle to erase in an image; 0 x 0 for none."""
    height, width = size
    draws = jax.random.uniform(jax.random.fold_in(key, BOX), (3 + 2 * ERASING_TRIES,))
    hit, top, left = draws[:3]
    areas, aspects = draws[3:].reshape(2, ERASING_TRIES)
    area = height * width * (ERASED_AREAS[0] + (ERASED_AREAS[1] - ERASED_AREAS[0]) * areas)
    aspect = ERASED_ASPECT ** (2 * aspects - 1)
    high, wide = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (area * aspect, area / aspect))
    fits = (high < height) & (wide < width)
    first = jnp.argmax(fits)
    erased = jnp.any(fits) & (hit < probability)
    high, wide = jnp.where(erased, high[first], 0), jnp.where(erased, wide[first], 0)
    return _floor(top * (height - high + 1)), _floor(left * (width - wide + 1)), high, wide


def _floor(value: jax.Array) -> jax.Array:
    """Rounds a drawn share of n < 2**23 down; the result is below n, because draws are at most 1 - 2**-23."""
    return jnp.floor(value).astype(jnp.int32)


def _between(start: jax.Array, end: jax.Array, side: int) -> jax.Array:
    """Returns bool `[..., side]`: true from `start` up to, not including, `end`."""
    place = jnp.arange(side)
    return (place >= start[..., None]) & (place < end[..., None])
