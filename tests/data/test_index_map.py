"""The order of the stream: repeated augmentation, and the rows of each host."""

import dataclasses
import itertools

import grain
import numpy as np
import pytest

from top_jax.config import AugmentConfig, DataConfig
from top_jax.data import eval_batches, train_batches
from top_jax.data.index_map import host_share, repeat_each
from top_jax.data.sources import DigitsSource

CONFIG = DataConfig(train_transform="shift_crop", shift=3, eval_crop=1.0)
EVERYTHING = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, repeats=3)
TRAIN = {"img_size": 8, "batch_size": 20, "seed": 5}
STEPS = 2  # batches in an epoch of 47 images: seven are left over


class FewDigits(DigitsSource):
    """The first 47 digits."""

    def __len__(self):
        return 47


@pytest.fixture(scope="module")
def digits():
    return FewDigits("train")


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def test_an_epoch_is_an_epoch_of_the_parent():
    """Ten numbers, each three times, until seven are out; the next epoch begins with the parent's next."""
    numbers = grain.MapDataset.range(10).map(lambda i: i)
    thrice = repeat_each(numbers, 3, 7)
    assert len(thrice) == 7 and [thrice[i] for i in range(8)] == [0, 0, 0, 1, 1, 1, 2, 0]
    shuffled = grain.MapDataset.range(10).seed(0).shuffle()
    twice = repeat_each(shuffled, 2, 20)
    for epoch in range(3):
        expected = [shuffled[10 * epoch + i // 2] for i in range(20)]
        assert [twice[20 * epoch + i] for i in range(20)] == expected
    assert [twice[i] for i in range(20)] != [twice[20 + i] for i in range(20)]


def test_a_host_takes_a_block_of_each_batch():
    rows = [host_share(grain.MapDataset.range(12), 6, host, 3) for host in range(3)]
    assert [[share[i] for i in range(4)] for share in rows] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert list(rows[1][1:3]) == [3, 8]


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_repeats_follow_each_other_and_differ(digits, repeats):
    """An epoch has the first ceil(40 / repeats) images of its shuffle, each repeated in a row, across batches."""
    plain = take(train_batches(digits, CONFIG, **TRAIN), 3 * STEPS)
    batches = take(train_batches(digits, CONFIG, augment=AugmentConfig(repeats=repeats), **TRAIN), 3 * STEPS)
    for epoch in range(3):
        part = slice(epoch * STEPS, (epoch + 1) * STEPS)
        order, index = (np.concatenate([b["index"] for b in batches_[part]]) for batches_ in (plain, batches))
        np.testing.assert_array_equal(index, np.repeat(order[: -(-40 // repeats)], repeats)[:40])
        images = np.concatenate([b["image"] for b in batches[part]])
        same = [np.array_equal(images[i], images[i + 1]) for i in range(39) if index[i] == index[i + 1]]
        assert len(same) >= 20 and np.mean(same) < 0.2  # one of the 49 shifts twice in a row


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def assert_rows_are_shared(whole, shares):
    """The hosts' batches, one after another, are the batches of one host."""
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part["index"]) for part in parts} == {len(batch["index"]) // len(shares)}
        assert_same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_take_blocks_of_what_one_host_sees(digits, process_count, repeats):
    """Over two borders of epochs, each image augmented as there."""
    settings = TRAIN | {"augment": dataclasses.replace(EVERYTHING, repeats=repeats)}
    whole = take(train_batches(digits, CONFIG, **settings), 2 * STEPS + 1)
    hosts = [
        train_batches(digits, CONFIG, **settings, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    assert_rows_are_shared(whole, [take(host, 2 * STEPS + 1) for host in hosts])
    late = hosts[-1]
    late.set_state({"batches": STEPS})
    rows = slice(-20 // process_count, None)
    assert_same({name: x[rows] for name, x in whole[STEPS].items()}, take(late, 1)[0])


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_take_blocks_of_evaluation(digits, process_count):
    settings = {"img_size": 8, "batch_size": 20}
    whole = take(eval_batches(digits, CONFIG, **settings), None)
    hosts = [
        eval_batches(digits, CONFIG, **settings, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    assert {len(host) for host in hosts} == {3}
    assert_rows_are_shared(whole, [take(host, None) for host in hosts])
