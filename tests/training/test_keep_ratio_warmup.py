"""The stages of a keep-ratio warm-up, by hand, for every method; and that they are a function of the step."""

import dataclasses

import pytest

from top_jax.build import build_reduction
from top_jax.config import PruningConfig
from top_jax.errors import InputError
from top_jax.pruning import Evit, Merging, Pruning
from top_jax.training.keep_ratio_warmup import Stage, stage_at, stages

TOP = PruningConfig(after_blocks=(5, 10, 15), keep_ratio=(0.8,), warmup_epochs=2.0)
VIM = dict(num_patches=196, depth=24)


def plan(config, *, steps_per_epoch=10.0, total_steps=100, **sizes):
    return stages(
        build_reduction(config), config, steps_per_epoch=steps_per_epoch, total_steps=total_steps, **(VIM | sizes)
    )


def counts(found, **sizes):
    return [tuple(cut.after for cut in stage.reduction.schedule(**(VIM | sizes))) for stage in found]


def test_by_hand():
    found = plan(TOP)
    assert [stage.first_step for stage in found] == [0, 5, 10, 15, 20]
    assert [stage.reduction.ratios[0] for stage in found] == pytest.approx([1, 0.95, 0.9, 0.85, 0.8])
    # 196 -> 187 (186.2) -> 178 (177.65) -> 170 (169.1), and so on
    assert counts(found) == [(196, 196, 196), (187, 178, 170), (177, 160, 144), (167, 142, 121), (157, 126, 101)]
    assert found[-1] == Stage(20, Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8))


def test_each_prune_goes_its_own_way():
    config = dataclasses.replace(TOP, keep_ratio=(0.5, 1.0, 0.8), warmup_stages=2)
    ratios = [stage.reduction.ratios for stage in plan(config)]
    assert ratios == [(1, 1, 1), pytest.approx((0.75, 1, 0.9)), (0.5, 1.0, 0.8)]


def test_steps_that_do_not_divide():
    """Stages of 10 / 4 steps begin at the first whole step; of a step that several would begin at, the last one."""
    assert [stage.first_step for stage in plan(TOP, steps_per_epoch=5.1)] == [0, 3, 5, 8, 10]
    found = plan(TOP, steps_per_epoch=1.0)
    assert [stage.first_step for stage in found] == [0, 1, 2]
    assert counts(found) == [(196, 196, 196), (177, 160, 144), (157, 126, 101)]
    assert plan(TOP, steps_per_epoch=0.1) == (Stage(0, Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8)),)


def test_without_a_warm_up():
    target = Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8)
    assert plan(dataclasses.replace(TOP, warmup_epochs=0.0)) == (Stage(0, target),)
    assert plan(PruningConfig(), total_steps=1) == (Stage(0, build_reduction(PruningConfig())),)


def test_equal_counts_are_one_stage():
    """Keep ratios 0.95, 0.9 and 0.85 all keep 4 of 4 patches: one dense program until 0.6."""
    config = dataclasses.replace(TOP, after_blocks=(1,), keep_ratio=(0.75,), warmup_stages=5)
    found = plan(config, num_patches=4, depth=2)
    assert [stage.first_step for stage in found] == [0, 20] and counts(found, num_patches=4, depth=2) == [(4,), (3,)]
    everything = dataclasses.replace(config, keep_ratio=(1.0,))
    assert plan(everything, num_patches=4, depth=2) == (Stage(0, Pruning(after_blocks=(1,), keep_ratio=1.0)),)


def test_evit():
    """A fused token makes up for one that is dropped: as many tokens, but not the dense model."""
    config = PruningConfig(method="evit", after_blocks=(1,), keep_ratio=(0.75,), warmup_epochs=2.0, warmup_stages=2)
    found = plan(config, num_patches=4, depth=2)
    assert found == (Stage(0, found[0].reduction), Stage(20, Evit(after_blocks=(1,), keep_ratio=0.75)))
    assert counts(found, num_patches=4, depth=2) == [(4,), (4,)] and found[0].reduction.ratios == (0.875,)
    found = plan(dataclasses.replace(config, after_blocks=(4, 7, 10), keep_ratio=(0.7,)), depth=12)
    assert counts(found, depth=12) == [(196, 196, 196), (168, 144, 124), (139, 99, 71)]


def test_merging():
    """Every stage merges no more than half; what the target cannot is refused by the method's own rule."""
    config = PruningConfig(method="merge", after_blocks=(5, 10), keep_ratio=(0.5,), warmup_epochs=2.0)
    found = plan(config)
    assert counts(found)[-1] == (98, 49) and len(found) == 5
    assert all(isinstance(stage.reduction, Merging) for stage in found)
    with pytest.raises(InputError, match="98"):
        plan(dataclasses.replace(config, keep_ratio=(0.4,)))


def test_stage_at():
    found = plan(TOP)
    at = {step: stage_at(found, step).first_step for step in (0, 4, 5, 19, 20, 99)}
    assert at == {0: 0, 4: 0, 5: 5, 19: 15, 20: 20, 99: 20}


def test_what_is_refused():
    with pytest.raises(InputError, match=r"pruning\.warmup_epochs=2\.0 .*pruning\.after_blocks"):
        plan(PruningConfig(warmup_epochs=2.0))
    with pytest.raises(InputError, match=r"pruning\.warmup_epochs=2\.0 .*20 of .*20 steps"):
        plan(TOP, total_steps=20)
    assert plan(TOP, total_steps=21)[-1].first_step == 20
    with pytest.raises(InputError, match="block 15"):
        plan(TOP, depth=15)
