"""Every file in configs/ is a run that could start."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from top_jax.config import PruningConfig, RunConfig
from top_jax.models import abstract_model
from top_jax.training.checkpoints import make_pruning

FOLDER = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PRUNED = [name for name in NAMES if name.endswith("_top")]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return RunConfig.from_config_dict(load(name).get_config())


def test_all_are_there():
    dense = {"vim_t", "vim_s", "vim_b", "vim_cifar10", "vim_digits"}
    assert set(NAMES) >= dense | {f"{name}_top" for name in dense}


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    text = load(name).__doc__
    assert re.search(rf"^python train\.py --config configs/{name}\.py( |$)", text, re.MULTILINE)
    assert re.search(r"^Expected\b.*:", text, re.MULTILINE) and "Measured: " in text
    config = read(name)
    assert ("--config.data.data_dir=" in text) == (config.data.source != "digits")


@pytest.mark.parametrize("name", NAMES)
def test_builds(name):
    config = read(name)
    model = abstract_model(config.model.name, pruning=make_pruning(config.pruning), **config.model.overrides())
    assert model.config.num_classes == config.model.num_classes
    assert model.pruning.after_blocks == config.pruning.after_blocks
    assert bool(config.pruning.after_blocks) == name.endswith("_top")


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_twin(name):
    """The dense run's weights fit, and only pruning tells the two models apart."""
    pruned, dense = read(name), read(name.removesuffix("_top"))
    assert dense.pruning == PruningConfig()
    assert dataclasses.replace(pruned.model, drop_path=None) == dataclasses.replace(dense.model, drop_path=None)
    recipe = ("train_transform", "min_area", "shift", "flip")
    assert {k: v for k, v in dataclasses.asdict(pruned.data).items() if k not in recipe} == {
        k: v for k, v in dataclasses.asdict(dense.data).items() if k not in recipe
    }


def test_the_papers_schedule():
    config = read("vim_s_top")
    assert config.pruning.after_blocks == (5, 10, 15) and config.pruning.keep_ratio == (0.8,)
    assert (config.pruning.score, config.pruning.alignment) == ("clip", "hold")
