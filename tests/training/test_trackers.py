"""Weights & Biases behind its hook: what it gets, and that it never ends a run that has started."""

import sys
import types

import pytest

from top_jax.config import RunConfig
from top_jax.errors import InputError
from top_jax.training.reporting import make_reporter
from top_jax.training.run_directory import RunDirectory

CONFIG = RunConfig(tracker="wandb")


class Run:
    """What the calls were."""

    def __init__(self, fails=False):
        self.logged, self.metrics, self.finished, self.fails = [], [], 0, fails

    def define_metric(self, *arguments, **settings):
        self.metrics.append((arguments, settings))

    def log(self, values):
        if self.fails:
            raise ConnectionError("no network")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A module in its place, which needs no account and starts no process."""
    module = types.ModuleType("wandb")
    module.runs, module.started, module.fails = [], [], False

    def init(**settings):
        module.started.append(settings)
        module.runs.append(Run(module.fails))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def report(path, first_step, *steps, config=CONFIG):
    with make_reporter(RunDirectory(path), first_step=first_step, total_steps=9, config=config) as reporter:
        for step in steps:
            reporter.metrics("train", step, {"loss": 1.0 / step, "images_per_second": None})


def test_every_number_once_and_one_run(wandb, tmp_path):
    report(tmp_path, 0, 1, 2)
    report(tmp_path, 2, 3)
    first, second = wandb.runs
    assert first.logged == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert second.logged == [{"step": 3, "train/loss": 1 / 3}] and (first.finished, second.finished) == (1, 1)
    assert first.metrics == [(("*",), {"step_metric": "step"})]
    before, after = wandb.started
    assert before["id"] == after["id"] and before["resume"] == "allow" and before["dir"] == str(tmp_path)
    assert before["config"] == CONFIG.to_dict() and before["project"] == "top-jax"


def test_one_that_fails_later_is_left(wandb, tmp_path, caplog):
    wandb.fails = True
    report(tmp_path, 0, 1, 2, 3)
    assert len(caplog.records) == 1 and "no network" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_does_not_start_is_an_error(wandb, tmp_path, monkeypatch):
    def init(**settings):
        raise RuntimeError("no API key\nconfigured")

    wandb.init = init
    with pytest.raises(InputError, match="no API key configured.*WANDB_MODE=offline"):
        report(tmp_path, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb.*pip install"):
        report(tmp_path, 0)


def test_none_by_default(wandb, tmp_path):
    report(tmp_path, 0, 1, config=RunConfig())
    assert wandb.started == []
    with pytest.raises(InputError, match="tracker='mlflow'.*wandb"):
        RunConfig(tracker="mlflow")
