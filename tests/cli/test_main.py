"""top-jax: its commands, its help, configs by name, and where a run goes by default."""

import json
import shutil
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from top_jax.cli import config_file, usage
from top_jax.cli.main import COMMANDS
from top_jax.config import RunConfig
from top_jax.errors import InputError


def test_every_command_is_listed(root):
    modules = {path.stem for path in (root / "top_jax/cli").glob("*.py") if "runner.run(main)" in path.read_text()}
    assert modules - {"main"} == COMMANDS.keys()  # main.py says so of the others


def test_help_names_every_command(command):
    result = command("top-jax", "--help")
    assert result.status == 0 and all(f"  {name} " in result.out for name in COMMANDS)
    assert command("top-jax").status == 2


def test_unknown_command(refused):
    assert "'evalute'" in refused("top-jax", "evalute") and "evaluate" in refused("top-jax", "evalute")


def test_version(command):
    import top_jax

    assert command("top-jax", "--version").out == f"top-jax {top_jax.__version__}\n"


def test_a_command_by_its_name(command):
    """With a config by its name; the same numbers as by the module and the config's path."""
    by_name = command("top-jax", "flops", "--config=vim_digits_top")
    assert by_name.status == 0
    assert by_name.out == command("flops", "--config=configs/vim_digits_top.py").out


def test_help_of_train_lists_every_setting(command):
    settings = {one.key: one for one in usage.settings()}
    assert settings.keys() == flatten_dict(RunConfig().to_dict(), sep=".").keys()
    assert all(len(one.meaning) > 3 for one in settings.values())
    assert settings["data.min_area"].default == 0.08 and "smallest crop" in settings["data.min_area"].meaning
    result = command("train.py", "--help")
    assert result.status == 0 and all(f"  {key}=" in result.out for key in settings)
    assert "--workdir=" in result.out and "flag" not in command("evaluate", "--help").err


def test_configs_by_name(root, tmp_path, monkeypatch):
    configs = config_file.shipped_configs()
    assert configs.keys() == {path.stem for path in (root / "configs").glob("*.py")}
    monkeypatch.chdir(tmp_path)
    chosen = config_file.with_config(["top-jax", "--config=vim_s_top"])[1]
    assert Path(chosen.removeprefix("--config=")).samefile(root / "configs" / "vim_s_top.py")
    (tmp_path / "vim_s_top").mkdir()  # no run, so no reason to take it
    assert config_file.with_config(["top-jax", "--config=vim_s_top"])[1] == chosen


@pytest.mark.parametrize(("name", "meant"), [("vim_s_tpo", "vim_s_top"), ("configs/vim_t.py", "--config=vim_t")])
def test_unknown_config(tmp_path, monkeypatch, name, meant):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{name}.*{meant}"):
        config_file.with_config(["top-jax", f"--config={name}"])


@pytest.mark.parametrize(
    ("flags", "workdir"),
    [
        (["--config=vim_digits"], "runs/vim_digits"),
        (["--config=vim_s_top", "--config.data.data_dir=/x/tfds"], "runs/vim_s_top"),
        (["--config=vim_s_top", "--config.data.name=food101"], "runs/vim_s_top_food101"),
        (
            ["--config=vim_s_top", "--config.data.source=image_folder", "--config.data.data_dir=/x/my photos/"],
            "runs/vim_s_top_my-photos",
        ),
        (["--config=vim_s", "--config.data.source=packed", "--config.data.data_dir=a/b.npz"], "runs/vim_s_b"),
        (["--config=my_labels", "--config.data.infer=False", "--config.data.data_dir=/x/lab2"], "runs/my_labels_lab2"),
        (["--config=vim_s", "--config.data.name=food101", "--workdir=mine"], "mine"),
    ],
)
def test_default_workdir(command, monkeypatch, flags, workdir):
    """Other data than the config's own never goes into the run of that config."""
    seen = []
    monkeypatch.setattr("top_jax.training.train", lambda config, workdir: seen.append(workdir), raising=False)
    assert command("train.py", *flags).status == 0
    assert seen == [workdir]


def test_an_earlier_default_workdir_goes_on(command, monkeypatch, finished_run, tmp_path):
    """A run of other data that is already in runs/<config name> is resumed, not begun again elsewhere."""
    name = Path(__file__).parents[1] / "tiny_run.py"
    shutil.copytree(finished_run, tmp_path / "runs" / "tiny_run")
    seen = []
    monkeypatch.setattr("top_jax.training.train", lambda config, workdir: seen.append(workdir), raising=False)
    monkeypatch.chdir(tmp_path)
    assert command("train", f"--config={name}", "--config.data.source=digits").status == 0
    assert seen == ["runs/tiny_run"]


def test_data_of_the_run(command, finished_run, tmp_path, caplog):
    """A config that does not say where its ImageNet is does not ask for it: the run knows its own data."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["num_classes"] = 1000
    settings["data"] |= {"source": "tfds", "name": "imagenet2012", "eval_split": "validation"}
    text = f"from top_jax.config import make_config\n\ndef get_config():\n    return make_config(**{settings!r})\n"
    (tmp_path / "imagenet.py").write_text(text)
    result = command("evaluate", f"--config={tmp_path}/imagenet.py", f"--checkpoint={run}", "--which=latest")
    assert result.status == 0, result.err
    assert json.loads(result.out)["data"] == "digits/test"
    assert [record.getMessage() for record in caplog.records if "imagenet" in record.getMessage()]
