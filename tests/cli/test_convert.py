"""convert: files to run directories and back, what it prints, writes and refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys

import numpy as np
import pytest
from hub_server import serving

import top_jax
from top_jax.convert import load_state_dict, state_dict_of
from top_jax.convert.checkpoint_files import read_state_dict
from top_jax.convert.key_summary import key_summary
from top_jax.models import abstract_model
from top_jax.training.weights import load_checkpoint

# The smallest of every family, as overrides; PlainMamba with BatchNorm in the stem and in a block.
FAMILIES = {
    "vim_tiny": {"embed_dim": 16, "depth": 2, "d_state": 4},
    "plain_mamba_l1": {"embed_dim": 16, "depth": 2, "d_state": 4, "layers_with_dwconv": (1,)},
    "deit_tiny": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 3}
TORCH = pytest.mark.torch


def arguments(sizes):
    return [f"--override={name}={value}" for name, value in sizes.items()]


def assert_same(got, want):
    got, want = (x if isinstance(x, dict) else state_dict_of(x) for x in (got, want))
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=TORCH), ".safetensors"])
@pytest.mark.parametrize(
    "name", ["plain_mamba_l1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vim_tiny", "deit_tiny"))]
)
def test_there_and_back(command, random_model, name, suffix, tmp_path):
    """file -> run directory -> file: the same tensors; and file -> file, of the other kind."""
    sizes = {**SMALL, **FAMILIES[name]}
    model = random_model(name, **sizes)
    source, run, back = tmp_path / f"a{suffix}", tmp_path / "run", tmp_path / f"b{suffix}"
    top_jax.save_torch_checkpoint(model, source)

    result = command("convert", str(source), str(run), f"--model={name}", *arguments(sizes))
    assert result.status == 0 and f"{source} ({name}) -> {run}\n" in result.out
    assert f"  top-jax evaluate --config CONFIG --checkpoint {run}\n" in result.out
    for which in ("best", "latest"):
        assert_same(load_checkpoint(run, which), model)

    result = command("convert", str(run), str(back))
    assert result.status == 0 and f"{run} ({name}) -> {back}\n" in result.out
    assert "[in, out] -> [out, in]" in result.out and "[out, in] ->" not in result.out  # as they are written
    again = shlex.split(result.out.splitlines()[-1].replace("RUN", str(tmp_path / "again")))  # the printed way back
    assert again[:2] == ["top-jax", "convert"] and command(*again[1:]).status == 0
    assert_same(load_checkpoint(tmp_path / "again"), model)
    assert_same(read_state_dict(back), read_state_dict(source))
    assert_same(read_state_dict(back), model)

    other = tmp_path / "c.safetensors"
    assert command("convert", str(back), str(other), f"--model={name}", *arguments(sizes)).status == 0
    assert_same(read_state_dict(other), model)


def test_sizes_are_inferred(command, random_model, tmp_path):
    """A re-sized model needs no --model and no --override."""
    model = random_model("plain_mamba_l1", **SMALL, **FAMILIES["plain_mamba_l1"])
    source, run = tmp_path / "a.safetensors", tmp_path / "run"
    top_jax.save_torch_checkpoint(model, source)
    assert command("convert", str(source), str(run)).status == 0
    again = load_checkpoint(run)
    assert again.config == dataclasses.replace(model.config, dtype=again.config.dtype)
    assert_same(again, model)


def test_weights_by_name(command, refused, random_model, tmp_path, monkeypatch):
    model = random_model("vim_tiny", **SMALL, **FAMILIES["vim_tiny"])
    top_jax.save_torch_checkpoint(model, tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    files = {"o/r/a.safetensors": (tmp_path / "a.safetensors").read_bytes()}
    with serving(monkeypatch, tmp_path / "cache", files):
        result = command("convert", "hf://o/r/a.safetensors", "run")
        assert result.status == 0 and "hf://o/r/a.safetensors (vim_tiny) -> run\n" in result.out
        assert_same(load_checkpoint("run"), model)
        assert command("convert", "hf://o/r/a.safetensors", "b.safetensors").status == 0
        assert_same(read_state_dict("b.safetensors"), model)
        assert "o/r has no such file" in refused("convert", "hf://o/r/none.pth", "other")
        name = "--checkpoint=pretrained:vim_small"
        assert "--config is needed" in refused("evaluate", name)
    assert json.loads((tmp_path / "run" / "conversion.json").read_text())["source"] == "hf://o/r/a.safetensors"


def test_report(command, random_model, tmp_path):
    """Printed for people, and written for programs: in a run directory, beside a file, or where it is asked for."""
    sizes = {**SMALL, **FAMILIES["plain_mamba_l1"]}
    model = random_model("plain_mamba_l1", **sizes)
    source = tmp_path / "a.safetensors"
    top_jax.save_torch_checkpoint(model, source)
    flags = ["--model=plain_mamba_l1", *arguments({**sizes, "img_size": (24, 16)})]

    result = command("convert", str(source), str(tmp_path / "run"), *flags)
    resized = "backbone.pos_embed resized from 4 x 4 to 6 x 4 patches (bicubic)"
    report = key_summary(abstract_model("plain_mamba_l1", **{**sizes, "img_size": (24, 16)}), (resized,))
    assert str(report) in result.out and resized in result.out
    assert "tail" not in result.out and "dw.0.weight [16, 1, 3, 3] (in 1 of 2)" in result.out
    written = json.loads((tmp_path / "run" / "conversion.json").read_text())
    about = {name: written.pop(name) for name in ("source", "target", "model", "ema")}
    assert about == {"source": str(source), "target": f"{tmp_path}/run", "model": "plain_mamba_l1", "ema": False}
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["changes"] == [resized] and written["keys"] == len(read_state_dict(source))

    assert command("convert", str(tmp_path / "run"), str(tmp_path / "b.safetensors")).status == 0
    beside = json.loads((tmp_path / "b.safetensors.conversion.json").read_text())
    assert beside["groups"] == written["groups"] and beside["changes"] == []
    named = tmp_path / "elsewhere.json"
    assert command("convert", str(tmp_path / "run"), str(tmp_path / "c.safetensors"), f"--json={named}").status == 0
    assert json.loads(named.read_text())["keys"] == written["keys"]
    assert not (tmp_path / "c.safetensors.conversion.json").exists()


@TORCH
@pytest.mark.parametrize("ema", [False, True])
def test_averaged_weights_of_a_file(command, official_file, overrides, tmp_path, ema):
    flags = ["--model=vim_tiny", *overrides, *(["--ema"] if ema else [])]
    result = command("convert", str(official_file), str(tmp_path / "run"), *flags)
    assert result.status == 0 and ("(vim_tiny, averaged weights)" in result.out) is ema
    assert json.loads((tmp_path / "run" / "conversion.json").read_text())["ema"] is ema
    assert_same(load_checkpoint(tmp_path / "run"), read_state_dict(official_file, ema=ema))


@pytest.mark.slow
def test_averaged_weights_of_a_run(command, finished_run, tmp_path):
    """A run that kept averaged weights gives them by default, as for the other commands."""
    for flags, ema, which in (
        ([], True, "best"),
        (["--ema"], True, "best"),
        (["--noema"], False, "best"),
        (["--which=latest"], True, "latest"),
    ):
        target = tmp_path / "a.safetensors"
        result = command("convert", str(finished_run), str(target), "--overwrite", *flags)
        assert result.status == 0 and "no pruning schedule" in result.out
        assert_same(read_state_dict(target), load_checkpoint(finished_run, which, ema=ema))
    plain, averaged = (state_dict_of(load_checkpoint(finished_run, ema=ema)) for ema in (False, True))
    assert any(np.any(plain[name] != averaged[name]) for name in plain)  # or the above says nothing


def test_without_torch(command, random_model, tmp_path, monkeypatch):
    """From a .safetensors file to a run directory and back."""
    monkeypatch.setitem(sys.modules, "torch", None)
    sizes = {**SMALL, **FAMILIES["vim_tiny"]}
    model = random_model("vim_tiny", **sizes)
    top_jax.save_torch_checkpoint(model, tmp_path / "a.safetensors")
    flags = ["--model=vim_tiny", *arguments(sizes)]
    assert command("convert", f"{tmp_path}/a.safetensors", f"{tmp_path}/run", *flags).status == 0
    assert command("convert", f"{tmp_path}/run", f"{tmp_path}/b.safetensors").status == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.fixture(scope="module")
def vim_file(tmp_path_factory, random_model):
    """A ViM at 24 x 16 pixels: a grid of 6 x 4."""
    path = tmp_path_factory.mktemp("vim") / "vim.safetensors"
    sizes = {**SMALL, **FAMILIES["vim_tiny"], "img_size": (24, 16)}
    top_jax.save_torch_checkpoint(random_model("vim_tiny", **sizes), path)
    return path


@pytest.fixture(scope="module")
def vim_run(tmp_path_factory, vim_file):
    from top_jax.config import RunConfig
    from top_jax.models.weights import weights_of
    from top_jax.training.run_directory import RunDirectory
    from top_jax.training.weights import save_weights

    run = RunDirectory(tmp_path_factory.mktemp("vim") / "run")
    sizes = {**SMALL, **FAMILIES["vim_tiny"], "img_size": (24, 16)}
    run.claim(RunConfig.from_config_dict({"model": {"name": "vim_tiny", **sizes}}))
    model = abstract_model("vim_tiny", **sizes)
    load_state_dict(model, read_state_dict(vim_file))
    save_weights(run, weights_of(model))
    return run.path


VIM = ["--model=vim_tiny", *arguments({**SMALL, **FAMILIES["vim_tiny"]})]


def test_a_grid_that_is_not_square(command, refused, vim_file, tmp_path):
    target = str(tmp_path / "run")
    message = refused("convert", str(vim_file), target, *VIM)
    assert "24 patch tokens" in message and "checkpoint_img_size" in message
    for wrong in ("24,x", "1,2,3", "0", "-16"):
        message = refused("convert", str(vim_file), target, *VIM, f"--checkpoint_img_size={wrong}")
        assert message.startswith(f"--checkpoint_img_size={wrong}")
    result = command("convert", str(vim_file), target, *VIM, "--checkpoint_img_size=24,16")
    assert result.status == 0 and "pos_embed resized from 6 x 4 to 4 x 4 patches (bicubic)\n" in result.out


def test_targets_that_are_taken(command, refused, vim_file, tmp_path):
    run, file = tmp_path / "run", tmp_path / "copy.safetensors"
    flags = [*VIM, "--override=img_size=(24,16)"]
    for target in (run, file):
        assert command("convert", str(vim_file), str(target), *flags).status == 0
    used = refused("convert", str(vim_file), str(run), *flags)
    assert f"{run} already holds checkpoints" in used
    file.write_text("precious")
    used = refused("convert", str(vim_file), str(file), *flags)
    assert f"{file} exists" in used and "--overwrite" in used
    assert file.read_text() == "precious"
    assert command("convert", str(vim_file), str(file), "--overwrite", *flags).status == 0
    assert_same(read_state_dict(file), read_state_dict(vim_file))
    assert f"{tmp_path}/nowhere" in refused("convert", str(vim_file), f"{tmp_path}/nowhere/a.safetensors", *flags)


@pytest.mark.slow
def test_refuses_weights_that_do_not_fit(refused, vim_file, tmp_path):
    call = ("convert", str(vim_file), str(tmp_path / "run"), *VIM, "--override=img_size=(24,16)")
    assert "head.weight (3, 16) instead of (7, 16)" in refused(*call, "--override=num_classes=7")
    assert "depth=2, but depth=3" in refused(*call, "--override=depth=3")
    message = refused("convert", str(vim_file), str(tmp_path / "run"), "--model=plain_mamba_l1")
    assert message.startswith(f"{vim_file} does not fit plain_mamba_l1")
    assert "vim_tiny, vim_small, vim_base" in message
    assert not (tmp_path / "run").exists()


def test_refuses(refused, tmp_path):
    target = str(tmp_path / "converted")
    assert "got 0 arguments" in refused("convert", "--model=vim_tiny")
    assert "got 3 arguments" in refused("convert", "a.pth", "b", "c", "--model=vim_tiny")
    assert "a.pth does not exist" in refused("convert", "a.pth", target)
    assert "pretrained='vim_huge'" in refused("convert", "pretrained:vim_huge", target)
    assert "--override=depth" in refused("convert", "a.pth", target, "--model=vim_tiny", "--override=depth")
    assert "config.model.depht" in refused("convert", "a.pth", target, "--model=vim_tiny", "--override=depht=3")
    assert "config.model.depth='three'" in refused(
        "convert", "a.pth", target, "--model=vim_tiny", "--override=depth=three"
    )
    assert "vim_huge" in refused("convert", "a.pth", target, "--model=vim_huge")
    for name in ("nowhere.pth", "nowhere", "nowhere.safetensors"):
        message = refused("convert", str(tmp_path / name), target, "--model=vim_tiny")
        assert f"{tmp_path}/{name} does not exist" in message
    assert not (tmp_path / "converted").exists()


def test_refuses_of_a_run(command, refused, vim_run, vim_file, tmp_path):
    target, call = f"{tmp_path}/a.safetensors", ("convert", str(vim_run))
    assert f"{tmp_path}/b needs the suffix" in refused(*call, f"{tmp_path}/b")
    wrong_model = refused(*call, target, "--model=vim_small")
    assert "--model=vim_small" in wrong_model and "vim_tiny" in wrong_model
    wrong_flag = refused(*call, target, "--override=depth=2")
    assert "--override" in wrong_flag and str(vim_run) in wrong_flag
    assert "--checkpoint_img_size" in refused(*call, target, "--checkpoint_img_size=16")
    assert "--noema" in refused(*call, target, "--ema")
    assert "config.json" in refused("convert", str(tmp_path), target)
    assert str(vim_file) in refused("convert", str(vim_file), target, *VIM, "--ema")
    assert not any(tmp_path.iterdir())
    assert command(*call, target, "--model=vim_tiny").status == 0  # which is what it is
