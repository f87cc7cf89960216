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
    "no config": ([], "Flag --config must have a value other than None"),
    "no such config": (
        ["--config=configs/nowhere.py"],
        "config file configs/nowhere.py does not exist; pass one such as",
    ),
    "no such config, with a key": (["--config=configs/nowhere.py", "--config.seed=1"], "No such file or directory"),
    "unknown key": ([TINY, "--config.modle.depth=3"], "--config.modle.depth=3: the config has no key 'modle'"),
    "unknown deep key": (
        [TINY, "--config.model.depht=3"],
        "--config.model.depht=3: the config has no key 'depht' (did you mean 'depth'?)",
    ),
    "wrong type": ([TINY, "--config.batch_size=many"], "batch_size"),
    "wrong type of a placeholder": ([TINY, "--config.total_steps=1.5"], "total_steps"),
    "out of range": ([TINY, "--config.log_every=0"], "config.log_every=0; it must be at least 1."),
    "unknown flag": ([TINY, "--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
    "unexpected argument": ([TINY, "now"], "unexpected argument 'now'; this command takes only flags (--help)."),
    "unknown model": ([TINY, "--config.model.name=vim_huge"], "model 'vim_huge' is unknown; choose one of vim_tiny, "),
    "unknown scan": ([TINY, "--config.model.implementation=cuda"], "implementation='cuda' is unknown; choose one"),
    "unknown transform": ([TINY, "--config.data.train_transform=twist"], "train_transform='twist'; use one of "),
    "prune after the last block": ([TINY, "--config.pruning.after_blocks=(2,)"], "prunes after block 2 of 2"),
    "keep ratio": ([TINY, "--config.pruning.keep_ratio=(1.5,)"], "keep_ratio=1.5; needed: a share in (0, 1]"),
    "stride": ([TINY, "--config.model.stride=3"], "(8 - 4) is not divisible by the stride; sides such as 7 or 10 are."),
    "other classes": (
        [TINY, "--config.model.num_classes=7"],
        "digits/train has 10 classes and the model 7; set --config.model.num_classes=10.",
    ),
    "batch over micro-batches": (
        [TINY, "--config.batch_size=15"],
        "batch_size=15 is not divisible by 1 device times 2 micro-batches; use a multiple of 2.",
    ),
    "batch over images": ([TINY, "--config.batch_size=5000"], "fewer than batch_size=5000; use a smaller batch."),
    "no data_dir": (
        ["--config=configs/vim_s_top.py"],
        "where is imagenet2012? Pass --config.data.data_dir=DIR, a TFDS data_dir with imagenet2012 in array_record",
    ),
    "data_dir is not there": (
        ["--config=configs/vim_cifar10.py", "--config.data.data_dir=/nowhere"],
        "data_dir /nowhere does not exist. Prepare it in another environment (it needs TensorFlow): pip install",
    ),
    "no such init_from": (
        [TINY, "--config.init_from=/nowhere.pth"],
        "checkpoint /nowhere.pth does not exist; pass a run directory or an official .pth or .safetensors file.",
    ),
    "init_from no run": ([TINY, "--config.init_from=configs"], "configs is not a run directory"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(refused, workdir, case):
    arguments, message = CASES[case]
    assert message in refused("train.py", *arguments, f"--workdir={workdir}")
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): return 3", "returns no ConfigDict from get_config(); pass one such as"),
        ("def get_config(): return {}['x']", "the config file cannot be used: it raises an error for 'x'."),
        ("def get_config(:", "invalid syntax"),
        (
            "from top_jax.config import make_config\ndef get_config(): return make_config(batchsize=3)",
            "unknown config key config.batchsize; the keys there are augment, batch_size, ",
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
    assert message == (
        f"workdir {tmp_path}/file/run cannot be written (Not a directory); choose another with --workdir."
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_workdir_of_another_run(refused, finished_run, workdir):
    shutil.copytree(finished_run, workdir)

    def files():
        return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    before = files()
    message = refused("train.py", TINY, "--config.seed=1", "--config.model.d_state=8", f"--workdir={workdir}")
    assert str(workdir) in message and "(seed 0 there, 1 here, model.d_state 4 there, 8 here)" in message
    assert files() == before


def test_workdir_in_use(refused, finished_run, workdir):
    from top_jax.training.run_directory import RunDirectory

    shutil.copytree(finished_run, workdir)
    with RunDirectory(workdir).lock():
        message = refused("train.py", TINY, f"--workdir={workdir}")
    assert message == f"workdir {workdir} is in use by another process; wait for it, or choose another --workdir."


def test_from_the_shell(root, tmp_path):
    """The same in a process of its own: nothing else reaches the terminal."""
    command = [sys.executable, "train.py", TINY, "--config.log_every=0", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config.log_every=0; it must be at least 1.\n"
