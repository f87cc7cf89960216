"""Random changes of a whole batch of training images, on the device: pure functions, to be used inside jit.

In timm's order: flip, normalise, erase, mix. What befalls an image follows from the image's own key, and how the batch
is mixed from one key for all of it: neither depends on how the batch lies on the devices. Every draw has a number of
its own, which is folded into the key.

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

FLIP, BOX, NOISE = range(3)  # draws of an image, folded into its key
HOW, SHARE = range(2)  # draws of a batch


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
    """Model input and targets of a batch: all that `config` does on the device.

    Args:
        batch: image uint8 `[B, H, W, 3]`, label int32 `[B]` and mask float32 `[B]`, as the pipeline makes them.
        keys: `[B]` PRNG keys, one per image.
        batch_key: of the batch.
        config: flip, erasing and mixing.
        data: how pixels are normalised.
        num_classes: C.
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
    """Each image mirrored left to right, half of the time.

    Args:
        images: `[B, H, W, 3]` of any dtype.
        keys: `[B]`.
    """
    mirrored = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, FLIP)))(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """A rectangle of some images becomes noise: timm's RandomErasing in its mode "pixel".

    Its share of the area is uniform in 0.02 .. 1/3, its height / width log-uniform in 0.3 .. 1/0.3. The first of ten
    such draws that is less high and less wide than the image is put anywhere in it; where none is, the image stays as
    it is.

    Args:
        images: float32 `[B, H, W, 3]`, normalised: the noise is standard normal, of each pixel and channel.
        keys: `[B]`.
        probability: of each image to lose a rectangle.
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
    """Mixup or CutMix of image i with image B - 1 - i: timm's Mixup in its mode "batch".

    One share lambda ~ Beta(alpha, alpha) for the batch. Mixup adds lambda of an image to 1 - lambda of its partner.
    CutMix puts a box of the partner into the image, of sides `int(side * sqrt(1 - lambda))` about a pixel drawn from
    all; what lies outside the image is cut off, and lambda becomes the share of the pixels that are still the image's
    own. Targets are mixed by lambda.

    An image of mask 0 is no image: neither it nor its partner is mixed.

    Args:
        images: float32 `[B, H, W, 3]`.
        targets: float32 `[B, C]`.
        mask: float32 `[B]`, 0 for a row that holds no image.
        key: of the batch.
        config: the alphas, of which one at least is above 0, `mix_probability` (else nothing is mixed), and
            `switch_probability` (of CutMix, where both alphas are above 0).

    Returns:
        images and targets, and float32 `[B]` the share that is still each row's own: lambda, or 1.
    """
    share, own = _shares(key, (images.shape[1], images.shape[2]), config)
    alone = (mask == 0) | (mask[::-1] == 0)
    share = jnp.where(alone, 1.0, share)
    own = jnp.where(alone[:, None, None], 1.0, own)[..., None]
    images = images * own + images[::-1] * (1 - own)
    targets = targets * share[:, None] + targets[::-1] * (1 - share[:, None])
    return images, targets, share


def _shares(key: jax.Array, size: Size, config: AugmentConfig) -> tuple[jax.Array, jax.Array]:
    """float32 share of the batch's own images, and the same for each pixel, `[H, W]`."""
    mixed, cut, row, column = jax.random.uniform(jax.random.fold_in(key, HOW), (4,))
    cut = cut < (config.switch_probability if config.mixup and config.cutmix else float(config.cutmix > 0))
    alpha = jnp.where(cut, config.cutmix, config.mixup)
    share = jax.random.beta(jax.random.fold_in(key, SHARE), alpha, alpha)
    share = jnp.where(mixed < config.mix_probability, share, 1.0)
    inside = [_box_side(center, share, side) for center, side in zip((row, column), size, strict=True)]
    outside = 1.0 - (inside[0][:, None] & inside[1][None, :])
    return jnp.where(cut, jnp.mean(outside), share), jnp.where(cut, outside, share)


def _box_side(center: jax.Array, share: jax.Array, side: int) -> jax.Array:
    """bool `[side]`: where a CutMix box is, along one side of the image; `center` in [0, 1) of that side."""
    half = (side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    pixel = _floor(center * side)
    return _between(pixel - half, pixel + half, side)


def _rectangle(key: jax.Array, size: Size, probability: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width of what an image loses; 0 x 0 where it loses nothing."""
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
    """A share in [0, 1), which is below 1 by 2**-23 at least, of n < 2**23 is a whole number below n."""
    return jnp.floor(value).astype(jnp.int32)


def _between(start: jax.Array, end: jax.Array, side: int) -> jax.Array:
    """bool `[..., side]`: the pixels from `start` to before `end`."""
    place = jnp.arange(side)
    return (place >= start[..., None]) & (place < end[..., None])
