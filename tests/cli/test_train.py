"""Bad input to train.py: one line that says what to do, status 2, and nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TINY = f"--config={Path(__file__).parents[1] / 'tiny_run.py'}"


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


CASES = {
    "no config": ([], "--config is missing"),
    "no such config": (
        ["--config=configs/nowhere.py"],
        "configs/nowhere.py does not exist",
    ),
    "no such config, with a key": (
        ["--config=configs/nowhere.py", "--config.seed=1"],
        "configs/nowhere.py does not exist",
    ),
    "unknown key": ([TINY, "--config.modle.depth=3"], "--config.modle.depth=3"),
    "unknown deep key": (
        [TINY, "--config.model.depht=3"],
        "(did you mean 'depth'?)",
    ),
    "wrong type": ([TINY, "--config.batch_size=many"], "batch_size"),
    "wrong type of a placeholder": ([TINY, "--config.total_steps=1.5"], "total_steps"),
    "out of range": ([TINY, "--config.log_every=0"], "config.log_every=0"),
    "unknown flag": ([TINY, "--wrokdir=x"], "wrokdir"),
    "unexpected argument": ([TINY, "now"], "'now'"),
    "unknown model": ([TINY, "--config.model.name=vim_huge"], "vim_huge"),
    "unknown scan": ([TINY, "--config.model.implementation=cuda"], "implementation='cuda'"),
    "unknown transform": ([TINY, "--config.data.train_transform=twist"], "train_transform='twist'"),
    "prune after the last block": ([TINY, "--config.pruning.after_blocks=(2,)"], "after_blocks=(2,)"),
    "keep ratio": ([TINY, "--config.pruning.keep_ratio=(1.5,)"], "keep_ratio=1.5"),
    "stride": ([TINY, "--config.model.stride=3"], "sides such as 7 or 10"),
    "other classes": (
        [TINY, "--config.model.num_classes=7"],
        "--config.model.num_classes=10",
    ),
    "batch over micro-batches": (
        [TINY, "--config.batch_size=15"],
        "batch_size=15",
    ),
    "batch over images": ([TINY, "--config.batch_size=5000"], "batch_size=5000"),
    "no data_dir": (
        ["--config=configs/vim_s_top.py"],
        "--config.data.data_dir=DIR",
    ),
    "data_dir is not there": (
        ["--config=configs/vim_cifar10.py", "--config.data.data_dir=/nowhere"],
        "/nowhere",
    ),
    "no such init_from": (
        [TINY, "--config.init_from=/nowhere.pth"],
        "/nowhere.pth",
    ),
    "init_from no run": ([TINY, "--config.init_from=configs"], "config.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(refused, workdir, case):
    arguments, message = CASES[case]
    assert message in refused("train.py", *arguments, f"--workdir={workdir}")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 3", "get_config()"),
        ("def get_config(): return {}['x']", "'x'"),
        ("def get_config(:", "invalid syntax"),
        (
            "from top_jax.config import make_config\ndef get_config(): return make_config(batchsize=3)",
            "config.batchsize",
        ),
    ],
)
def test_bad_config_file(refused, workdir, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    assert message in refused("train.py", f"--config={tmp_path}/mine.py", f"--workdir={workdir}")
    assert not workdir.exists()


def test_nothing_in_the_default_workdir(refused, root):
    refused("train.py", TINY, "--config.batch_size=15")
    assert not (root / "runs" / "tiny_run").exists()


def test_unwritable_workdir(refused, tmp_path):
    """A path under a regular file: permissions would not stop root."""
    (tmp_path / "file").write_text("mine")
    message = refused("train.py", TINY, f"--workdir={tmp_path}/file/run")
    assert f"{tmp_path}/file/run" in message and "Not a directory" in message
    assert (tmp_path / "file").read_text() == "mine"


def test_workdir_of_another_run(refused, finished_run, workdir):
    shutil.copytree(finished_run, workdir)

    def files():
        return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    before = files()
    message = refused("train.py", TINY, "--config.seed=1", "--config.model.d_state=8", f"--workdir={workdir}")
    assert str(workdir) in message and "seed 0 there, 1 here, model.d_state 4 there, 8 here" in message
    assert files() == before


def test_workdir_in_use(refused, finished_run, workdir):
    from top_jax.training.run_directory import RunDirectory

    shutil.copytree(finished_run, workdir)
    with RunDirectory(workdir).lock():
        message = refused("train.py", TINY, f"--workdir={workdir}")
    assert f"{workdir} is in use" in message


def test_from_the_shell(root, tmp_path):
    """The same in a process of its own: nothing else reaches the terminal."""
    command = [sys.executable, "train.py", TINY, "--config.log_every=0", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: config.log_every=0") and done.stderr.count("\n") == 1
