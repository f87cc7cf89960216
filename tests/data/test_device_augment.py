"""Augmentation on the device against timm's definitions in NumPy: ranges, fills, shares, probabilities.

This file is also the program that runs on eight devices.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data.device_augment import augment, flip, mix, random_erasing
from top_jax.data.transforms import normalize

DATA = DataConfig(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
ALL = AugmentConfig(erasing=0.5, mixup=0.8, cutmix=1.0)
NOTHING = AugmentConfig(flip=False)
DEVICES = 8
MANY = 2000
QUICK = {"xla_backend_optimization_level": 0}  # nearly all the time is spent compiling


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def batch_of(size, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, 5, size), jnp.int32),
        "mask": jnp.asarray(np.ones(size, np.float32)),
    }


def run(config, batch, keys, batch_key):
    return augment(batch, keys, batch_key, config, DATA, num_classes=5, label_smoothing=0.1)


quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
erase = quick_jit(random_erasing, static_argnums=2)
compiled = functools.cache(lambda config: quick_jit(functools.partial(run, config)))


def augmented(config, batch, seed=0):
    return compiled(config)(batch, keys_of(len(batch["label"]), seed), jax.random.key(seed + 1))


def assert_share(hits, expected):
    """Checks the share of hits in many draws, to four standard deviations."""
    assert abs(np.mean(hits) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(hits))


def same_distribution(got, expected):
    return stats.ks_2samp(got, expected).pvalue > 1e-3


def test_nothing_is_on():
    batch = batch_of(8)
    images, targets = augmented(NOTHING, batch)
    normalized = quick_jit(normalize, static_argnums=(1, 2))(batch["image"], DATA.mean, DATA.std)
    np.testing.assert_array_equal(images, normalized)
    expected = 0.02 + 0.9 * np.eye(5)[np.asarray(batch["label"])]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_flip():
    images = np.asarray(batch_of(MANY, side=2)["image"])
    result = np.asarray(quick_jit(flip)(jnp.asarray(images), keys_of(MANY)))
    mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
    assert result.dtype == np.uint8 and (mirrored | (result == images).all((1, 2, 3))).all()
    assert_share(mirrored, 0.5)


def erased_boxes(height, width, probability):
    """Erases images that are 100 everywhere; returns what was erased, bool [MANY, H, W], and the noise."""
    images = np.full((MANY, height, width, 3), 100, np.float32)
    result = np.asarray(erase(images, keys_of(MANY), probability))
    erased = (result != 100).all(-1)
    assert (erased == (result != 100).any(-1)).all()
    return erased, result[erased]


def boxes_of(erased):
    """Checks that each mask is one box; returns top, left, height and width of each."""
    rows, columns = erased.any(2), erased.any(1)
    high, wide = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(erased.sum((1, 2)), high * wide)
    top, left = rows.argmax(1), columns.argmax(1)
    assert all(row[t : t + h].all() for row, t, h in zip(rows, top, high, strict=True))
    assert all(column[t : t + w].all() for column, t, w in zip(columns, left, wide, strict=True))
    return np.stack([top, left, high, wide], 1)


def timm_boxes(height, width, count):
    """The definition, drawn with NumPy: a box per image, or none."""
    rng, boxes = np.random.default_rng(1), []
    for _ in range(count):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high < height and wide < width:
                boxes.append((rng.integers(height - high + 1), rng.integers(width - wide + 1), high, wide))
                break
    return np.array(boxes)


def test_erased_boxes_are_timms():
    erased, noise = erased_boxes(24, 16, 0.6)
    hit = erased.any((1, 2))
    assert_share(hit, 0.6)
    boxes, expected = boxes_of(erased[hit]), timm_boxes(24, 16, MANY)
    for column in range(4):
        assert same_distribution(boxes[:, column], expected[:, column])
    for of in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0] + b[:, 2]):
        assert same_distribution(of(boxes), of(expected))
    assert stats.kstest(noise.ravel()[::7], "norm").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.9 * noise.size  # each image's own
    correlation = np.corrcoef(noise.T)  # of the channels
    assert np.abs(correlation - np.eye(3)).max() < 0.02


def test_the_first_box_that_fits():
    """Most draws do not fit a narrow image; the share of images where all ten fail follows the definition."""
    erased, _ = erased_boxes(2, 60, 1.0)
    hit = erased.any((1, 2))
    expected = timm_boxes(2, 60, MANY)
    assert 0.02 < 1 - len(expected) / MANY
    assert_share(hit, len(expected) / MANY)
    assert same_distribution(boxes_of(erased[hit])[:, 3], expected[:, 3])


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_erasing_never_and_always(probability):
    assert (erased_boxes(24, 16, probability)[0].any((1, 2)) == probability).all()


def mixes(config, count=MANY, side=1):
    """Shares of `count` batches of an image of ones and one of zeros, and what is left of the ones, [count, H, W]."""
    ones = np.ones((side, side, 3), np.float32)
    pair, classes, mask = jnp.asarray(np.stack([ones, 0 * ones])), np.eye(2, dtype=np.float32), np.ones(2, np.float32)
    draw = lambda key: mix(pair, jnp.asarray(classes), jnp.asarray(mask), key, config)  # noqa: E731
    images, targets, share = map(np.asarray, quick_jit(jax.vmap(draw))(keys_of(count)))
    own = images[:, 0, :, :, 0]
    np.testing.assert_array_equal(share[:, 0], share[:, 1])
    np.testing.assert_allclose(images[:, 1, :, :, 0], 1 - own, atol=1e-6)
    np.testing.assert_allclose(targets[:, 0], np.stack([share[:, 0], 1 - share[:, 0]], 1), atol=1e-6)
    np.testing.assert_allclose(own.mean((1, 2)), share[:, 0], atol=1e-6)  # the area, exactly
    return share[:, 0], own


def test_mixup_share_is_beta():
    alpha = 0.2
    share, own = mixes(AugmentConfig(mixup=alpha), side=2)
    assert (own == share[:, None, None]).all()
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def timm_cut(side, alpha, count):
    """Boxes (top, left, height, width) by the definition."""
    rng, boxes = np.random.default_rng(2), []
    for _ in range(count):
        half = int(side * math.sqrt(1 - rng.beta(alpha, alpha))) // 2
        low, high = (
            np.clip(center + offset, 0, side) for center in [rng.integers(side, size=2)] for offset in (-half, half)
        )
        boxes.append((*low, *(high - low)))
    return np.array(boxes)


def test_cutmix_boxes_are_timms():
    share, own = mixes(AugmentConfig(cutmix=0.5), side=12)
    assert set(np.unique(own)) == {0.0, 1.0}
    hit = share < 1
    boxes, expected = boxes_of(own[hit] == 0), timm_cut(12, 0.5, MANY)
    expected = expected[expected[:, 2] * expected[:, 3] > 0]
    assert_share(hit, len(expected) / MANY)
    for column in range(4):
        assert same_distribution(boxes[:, column], expected[:, column])
    assert same_distribution(boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3])


def test_when_a_batch_is_mixed_and_how():
    share, own = mixes(AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.7, switch_probability=0.25), side=24)
    whole = share == 1
    cut = ~whole & ((own == 0) | (own == 1)).all((1, 2))
    assert_share(whole, 0.3)
    assert_share(cut, 0.7 * 0.25)


@pytest.mark.parametrize("config", [AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0)])
def test_a_row_without_an_image_is_mixed_into_none(config):
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(6, 8, 8, 3)).astype(np.float32), np.eye(6, dtype=np.float32)
    mask = np.asarray([1, 0, 1, 1, 1, 1], np.float32)
    alone = np.array([False, True, False, False, True, False])  # 1 and its partner
    mixed_by = quick_jit(functools.partial(mix, config=config))
    for seed in range(5):
        mixed, new_targets, share = map(np.asarray, mixed_by(images, targets, mask, jax.random.key(seed)))
        assert ((share == 1) == alone).all()
        np.testing.assert_array_equal(mixed[alone], images[alone])
        np.testing.assert_array_equal(new_targets[alone], targets[alone])
        assert ((mixed != images).any((1, 2, 3)) == ~alone).all()
        expected = share[:, None] * targets + (1 - share)[:, None] * targets[::-1]
        np.testing.assert_allclose(new_targets, expected, atol=1e-6)


@pytest.mark.slow
def test_order_is_timms():
    """Flip, normalise, erase, mix: the noise is not flipped, standard normal, and mixed."""
    batch, plain = batch_of(8), augmented(NOTHING, batch_of(8))[1]

    @quick_jit
    def by_hand(batch, keys, batch_key):
        images = normalize(flip(batch["image"], keys), DATA.mean, DATA.std)
        return mix(random_erasing(images, keys, 0.5), plain, batch["mask"], batch_key, ALL)

    images, targets = augmented(ALL, batch)
    expected, expected_targets, share = by_hand(batch, keys_of(8), jax.random.key(1))
    np.testing.assert_allclose(images, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(targets, expected_targets, rtol=1e-6)
    np.testing.assert_allclose(np.sum(targets, axis=1), 1, rtol=1e-6)
    assert 0 < float(share[0]) < 1


def test_an_images_changes_follow_its_key():
    """They do not depend on the rest of the batch, and another key changes them."""
    batch, config = batch_of(8), AugmentConfig(erasing=1.0)
    images, _ = augmented(config, batch)
    rest = batch_of(8, seed=1)
    moved = {
        name: np.concatenate([np.asarray(value)[2:5], np.asarray(rest[name])[3:]]) for name, value in batch.items()
    }
    keys = jnp.concatenate([keys_of(8)[2:5], keys_of(8, seed=7)[3:]])
    got, _ = compiled(config)(moved, keys, jax.random.key(9))
    np.testing.assert_array_equal(np.asarray(got)[:3], np.asarray(images)[2:5])
    assert (np.asarray(augmented(config, batch, seed=1)[0]) != np.asarray(images)).any((1, 2, 3)).all()


def test_draws_do_not_follow_each_other():
    """Flip, erasing and the place of the rectangle are independent, though drawn from one key."""
    left_half = np.broadcast_to(np.asarray([[1, 0]], np.float32)[None, :, :, None], (MANY, 1, 2, 3))
    flipped = np.asarray(quick_jit(flip)(left_half, keys_of(MANY)))[:, 0, 0, 0] == 0
    erased = erased_boxes(24, 16, 0.6)[0]
    hit, (top, left, high, wide) = erased.any((1, 2)), boxes_of(erased).T
    draws = np.stack([flipped[hit], top[hit] + high[hit] / 2, left[hit] + wide[hit] / 2])
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.12
    assert abs(np.corrcoef(flipped, hit)[0, 1]) < 0.09


@pytest.mark.slow
def test_eight_devices(root):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-W", "error", __file__], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def check_devices() -> None:
    """Checks that partners are exchanged without gathering, and that the result is that of one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    by_image = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch, keys, batch_key = batch_of(4 * DEVICES), keys_of(4 * DEVICES), jax.random.key(1)

    def augmented(batch, key_data):
        return run(ALL, batch, jax.random.wrap_key_data(key_data), batch_key)

    arguments = batch, jax.random.key_data(keys)
    program = jax.jit(augmented).lower(*jax.device_put(arguments, by_image)).compile()
    collectives = set(
        re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", program.as_text())
    )
    assert collectives == {"collective-permute"}, collectives
    got = program(*jax.device_put(arguments, by_image))
    assert all(array.sharding.is_equivalent_to(by_image, array.ndim) for array in got)
    expected = jax.jit(augmented)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)
    print("same")


if __name__ == "__main__":
    check_devices()
