"""Faults, tried on tests/tiny_run.py as tests/fault_table.py tries them on any config."""

from __future__ import annotations

import gc
import logging
import shutil
import sys
import time

import pytest
from faults import FAULTS, Bench, Skipped, Tally
from faults.damage import checkpoint, cut, flip, index, lower_accuracy, restore, same_bits
from faults.not_finite import broken_batches, broken_run, went_back

from top_jax.errors import InputError, RunError
from top_jax.training.checkpoints import Checkpoints
from top_jax.training.run_directory import RunDirectory
from top_jax.training.weights import read_weights

pytestmark = pytest.mark.slow

# The others cost more than they would show here: each is like one of these, or like a test in tests/training.
TRIED = ("killed", "one_of_two_killed", "full_disk", "terminated_evaluating", "unreadable_images", "never_finite")


@pytest.fixture(scope="module")
def bench(launcher, finished_run, tmp_path_factory):
    return Bench(launcher, tmp_path_factory.mktemp("faults"), kills=2, finished=finished_run)


@pytest.mark.parametrize("fault", [*TRIED, "not_finite_killed"])
def test_survived(bench, fault):
    tally = Tally()
    try:
        FAULTS[fault](bench, tally)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert tally.survived == tally.tried > 0


def test_goes_back(bench, tmp_path):
    """A loss that is not finite, before anything is saved and later: the run leaves these batches out, and ends."""
    assert went_back(broken_run(bench, tmp_path / "run").end(), broken_batches(bench.total_steps)) > 0


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


def test_damaged_checkpoint(copy, caplog):
    """The newest that is whole is taken; where none is, nothing is touched."""
    cut(index(checkpoint(copy)))
    with caplog.at_level(logging.WARNING):
        assert int(restore(copy)["state"].step) == 28
    assert "the checkpoint of step 30 is damaged (" in caplog.text
    assert caplog.text.rstrip().endswith(f"moved to {copy}/checkpoints/damaged/30; going on from step 28")
    assert [path.name for path in (copy / "checkpoints" / "latest").iterdir()] == ["28"]
    cut(index(checkpoint(copy)))
    with pytest.raises(RunError, match=r"every checkpoint in .*/latest is damaged \(step 28: "):
        restore(copy)
    assert checkpoint(copy).name == "28"


def test_flipped_bits(finished_run, tmp_path):
    """Damages the position in the stream, the file that says where the arrays lie, and each file of arrays."""
    intact, newest = restore(finished_run), checkpoint(finished_run)
    data = newest / "data" / "metadata"
    arrays = [file for file in newest.glob("weights/ocdbt.process_0/d/*") if file.stat().st_size]
    places = [(data, data.read_bytes().index(b"30")), (index(newest), index(newest).stat().st_size // 2)]
    detected = []
    for number, (file, offset) in enumerate([*places, *((file, file.stat().st_size // 2) for file in arrays)]):
        workdir = shutil.copytree(finished_run, tmp_path / str(number))
        flip(workdir / file.relative_to(finished_run), offset)
        got = restore(workdir, like=intact)
        if file in arrays and same_bits(got, intact):  # Orbax writes parts of them more than once
            continue
        assert int(got["state"].step) == 28, f"bit 0 of byte {offset} of {file}"
        detected.append(file)
    assert set(detected) & set(arrays)


@pytest.mark.parametrize("harm", [cut, lower_accuracy])
def test_damaged_best(copy, caplog, harm):
    """The run goes on without it: the accuracy by which the next one would be judged is lost."""
    best = checkpoint(copy, "best")
    harm(best / "metrics" / "metrics")
    with caplog.at_level(logging.WARNING), Checkpoints(copy / "checkpoints") as checkpoints:
        assert checkpoints.best_score() is None and checkpoints.latest_step() == 30
    assert f"moved to {copy}/checkpoints/damaged/best-{best.name};" in caplog.text
    with pytest.raises(InputError, match="no 'best' checkpoint"):
        read_weights(RunDirectory(copy))


@pytest.mark.parametrize("which", ["best", "latest"])
def test_weights_that_cannot_be_read(copy, which):
    cut(index(checkpoint(copy, which)))
    with pytest.raises(RunError, match=rf"the '{which}' checkpoint of {copy} is damaged"):
        read_weights(RunDirectory(copy), which)


def test_the_hook_for_late_errors_is_restored(copy, monkeypatch):
    """Orbax's other reads end after the first error; once they have, Python's hook is the one that was there before."""
    late = []
    monkeypatch.setattr("sys.unraisablehook", late.append)
    hook, levels = sys.unraisablehook, [logging.getLogger(name).level for name in ("absl", "asyncio")]
    cut(index(checkpoint(copy, "latest")))
    for _ in range(3):
        with pytest.raises(RunError):
            read_weights(RunDirectory(copy), "latest")
        assert sys.unraisablehook is hook
        assert [logging.getLogger(name).level for name in ("absl", "asyncio")] == levels
    time.sleep(0.2)
    gc.collect()
    assert late == []


def test_best_whose_accuracy_cannot_be_read(copy):
    """Looking at it moves nothing."""
    cut(checkpoint(copy, "best") / "metrics" / "metrics")
    with pytest.raises(RunError, match=r"the 'best' checkpoint of .* \(Expecting "):
        read_weights(RunDirectory(copy))
    assert checkpoint(copy, "best").is_dir()
