from __future__ import annotations

import pytest

from top_jax.errors import InputError
from top_jax.pruning import Cut, Pruning


def test_counts_of_vim_small():
    assert Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8).schedule(196, 24) == (
        Cut(block=5, before=196, kept=157, after=157),
        Cut(block=10, before=157, kept=126, after=126),
        Cut(block=15, before=126, kept=101, after=101),
    )


def test_one_ratio_per_prune():
    pruning = Pruning(after_blocks=(2, 4), keep_ratio=(0.5, 1.0))
    assert pruning.ratios == (0.5, 1.0)
    assert pruning.schedule(9, 6) == (Cut(2, 9, 5, 5), Cut(4, 5, 5, 5))


@pytest.mark.usefixtures("without_type_checks")
def test_lists_become_tuples():
    assert Pruning(after_blocks=[2, 4], keep_ratio=[0.5, 1.0]) == Pruning(after_blocks=(2, 4), keep_ratio=(0.5, 1.0))


def test_rounding_noise_keeps_no_extra_token():
    assert 0.55 * 100 > 55  # so ceil alone would give 56
    assert Pruning(after_blocks=(1,), keep_ratio=0.55).schedule(100, 2) == (Cut(1, 100, 55, 55),)


def test_the_dense_model_is_the_empty_schedule():
    assert Pruning().ratios == () and Pruning().schedule(196, 24) == ()


def test_one_token_can_be_left():
    assert Pruning(after_blocks=(1, 2), keep_ratio=0.01).schedule(4, 3) == (Cut(1, 4, 1, 1), Cut(2, 1, 1, 1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"after_blocks": (5, 3)}, r"after_blocks=\(5, 3\)"),
        ({"after_blocks": (5, 5)}, r"after_blocks=\(5, 5\)"),
        ({"after_blocks": (0, 5)}, r"after_blocks=\(0, 5\)"),
        ({"after_blocks": (5,), "keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"after_blocks": (5,), "keep_ratio": 1.1}, "keep_ratio=1.1"),
        ({"after_blocks": (5,), "keep_ratio": float("nan")}, "keep_ratio=nan"),
        ({"after_blocks": (5, 9), "keep_ratio": (0.8, -0.1)}, "keep_ratio=-0.1"),
        ({"after_blocks": (5, 9), "keep_ratio": (0.8,)}, r"keep_ratio=\(0.8,\) for 2"),
        ({"score": "best"}, "score='best'"),
        ({"alignment": "held"}, "alignment='held'"),
        ({"order": "best"}, "order='best'"),
        ({"order": "score"}, "order='score' with alignment='hold'"),
        ({"order": "score", "alignment": "decay"}, "order='score' with alignment='decay'"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Pruning(**settings)


@pytest.mark.usefixtures("without_type_checks")
def test_block_numbers_are_integers():
    with pytest.raises(InputError, match=r"after_blocks=\(1.5,\)"):
        Pruning(after_blocks=(1.5,))


@pytest.mark.parametrize("block", [6, 7])
def test_a_prune_needs_a_block_after_it(block):
    with pytest.raises(InputError, match=f"after block {block} of 6"):
        Pruning(after_blocks=(block,), keep_ratio=0.5).schedule(9, 6)


def test_no_token_left():
    with pytest.raises(InputError, match="keep_ratio=1e-08 .* after block 1"):
        Pruning(after_blocks=(1,), keep_ratio=1e-8).schedule(4, 6)
