"""The grid: legal, each setting once, programs side by side."""

import dataclasses
import itertools

import pytest

from tests.tiny_segmenter import get_config
from top_jax.ablation import TABLES, base_pruning, make_grid
from top_jax.ablation.grid import (
    DENSE,
    Filled,
    check_settings,
    default_alignments,
    default_scores,
    program_key,
)
from top_jax.config import ModelConfig, PruningConfig, RunConfig
from top_jax.errors import InputError
from top_jax.pruning import Pruning

BASE = Pruning(after_blocks=(1,), keep_ratio=0.6)


def test_tables_share_their_settings():
    """4 alignments, 6 more scores of which one has 3 seeds, 4 x 3 more ratios, and the dense model: no more."""
    grid = make_grid(BASE)
    assert len(grid) == len(set(grid)) == 1 + 4 + (6 + 2) + 12
    assert grid[0] == DENSE and BASE in grid
    assert make_grid(BASE, keep_ratios=(0.9, 0.7, 0.5, 0.6)) == grid
    assert [s.seed for s in grid if s.score == "random"] == [0, 1, 2]
    assert {(s.alignment, s.order) for s in grid if s.keep_ratio == 0.5} == {
        ("none", "score"),
        ("none", "position"),
        ("hold", "position"),
        ("decay", "position"),
    }


def test_programs_come_side_by_side():
    keys = [program_key(setting) for setting in make_grid(BASE)]
    assert len([key for key, _ in itertools.groupby(keys)]) == len(set(keys)) == 1 + 3 * 4


def test_full_is_the_product():
    grid = make_grid(BASE, full=True, alignments=("none:score", "hold"), scores=("l1", "random"), keep_ratios=(0.5,))
    assert len(grid) == 1 + 2 * (1 + 3) * 2
    assert {s.keep_ratio for s in grid[1:]} == {0.5, 0.6}


def test_one_table():
    assert len(make_grid(BASE, tables=["alignment"])) == 1 + 4
    assert {s.alignment for s in make_grid(BASE, tables=["score"])[1:]} == {"hold"}


def test_base_is_the_configs_pruning(config):
    assert base_pruning(config) == Pruning(after_blocks=(1,), keep_ratio=0.5)
    mine = dataclasses.replace(config, pruning=PruningConfig(after_blocks=(1,), keep_ratio=(0.8,), alignment="decay"))
    assert base_pruning(mine) == Pruning(after_blocks=(1,), keep_ratio=0.8, alignment="decay")
    assert base_pruning(config, keep_ratio=0.3).keep_ratio == 0.3
    evit = dataclasses.replace(config, pruning=PruningConfig(method="evit", after_blocks=(1,), keep_ratio=(0.8,)))
    assert base_pruning(evit) == Pruning(after_blocks=(1,), keep_ratio=0.8)


def test_a_dense_config_needs_after_blocks(config):
    dense = dataclasses.replace(config, pruning=PruningConfig())
    with pytest.raises(InputError, match="--after_blocks"):
        base_pruning(dense)
    assert base_pruning(dense, after_blocks=[1]) == Pruning(after_blocks=(1,), keep_ratio=0.7)


def test_a_segmenter_has_fills():
    config = RunConfig.from_config_dict(get_config())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fill="carry"))
    base = base_pruning(config)
    assert base == Filled(after_blocks=(1,), keep_ratio=0.5, fill="carry")
    grid = make_grid(base, tables=["fill"])
    assert [setting.fill for setting in grid[1:]] == ["frozen", "nearest", "carry", "zero"]
    assert len({program_key(setting) for setting in grid}) == 5
    assert set(make_grid(base)) == set(grid) | set(make_grid(base, tables=TABLES))
    full = make_grid(base, full=True, alignments=["hold"], scores=["clip"], keep_ratios=[0.7], fills=["zero", "carry"])
    assert len(full) == 1 + 2 * 2
    check_settings(config, make_grid(base, scores=default_scores(config), alignments=default_alignments(config)))
    with pytest.raises(InputError, match="'moss'.*frozen, nearest, carry, zero"):
        make_grid(base, fills=["moss"])


def test_a_model_without_scan(config):
    deit = ModelConfig(name="deit_tiny", num_classes=10, img_size=(16,), patch_size=4, embed_dim=12, depth=2)
    config = dataclasses.replace(config, model=deit)
    base = base_pruning(config)
    assert base.score == "attention"
    assert default_scores(config) == ("attention", "random", "uniform")
    assert default_alignments(config) == ("none:score", "none", "hold")
    check_settings(config, make_grid(base, alignments=default_alignments(config), scores=default_scores(config)))
    with pytest.raises(InputError, match="alignment='decay'"):
        check_settings(config, make_grid(base, tables=["alignment"]))
    with pytest.raises(InputError, match="score='clip'.*attention"):
        check_settings(config, make_grid(base, tables=["score"], scores=["clip"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignments": ["hold:score"]}, "order='score'.*alignment='hold'"),
        ({"alignments": ["best"]}, "best"),
        ({"tables": ["speed"]}, "'speed'.*alignment, score, keep_ratio"),
        ({"scores": ["luck"]}, "score='luck'"),
        ({"keep_ratios": [1.5]}, "keep_ratio=1.5"),
        ({"random_seeds": 0}, "random_seeds=0"),
        ({"tables": ["fill"]}, "'fill'.*classifier"),
        ({"fills": ["zero"]}, "zero.*classifier"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        make_grid(BASE, **settings)
