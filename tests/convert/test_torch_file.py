"""Official .pth files, written here with torch."""

from __future__ import annotations

import argparse
import sys
import zipfile

import numpy as np
import pytest

from top_jax.convert import load_torch_checkpoint
from top_jax.convert.torch_file import read_state_dict
from top_jax.errors import InputError
from top_jax.pruning import Pruning

needs_torch = pytest.mark.torch


@needs_torch
def test_a_real_training_checkpoint(save, state_dict, tiny):
    """As the ViM authors' training script writes it: a Namespace, an optimizer and averaged weights beside `model`."""
    import torch

    averaged = {name: array + 1 for name, array in state_dict.items()}
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    path = save(
        model=state_dict,
        model_ema=averaged,
        optimizer=optimizer.state_dict(),
        lr_scheduler={"base_lrs": [1e-3]},
        scaler={"scale": 65536.0},
        epoch=299,
        args=argparse.Namespace(model="vim_tiny", lr=5e-4, data_path=None),
    )
    for ema, want in ((False, state_dict), (True, averaged)):
        model = load_torch_checkpoint(path, "vim_tiny", ema=ema, **tiny)
        np.testing.assert_array_equal(model.norm.scale[...], want["norm_f.weight"])
        np.testing.assert_array_equal(
            model.blocks[0].mixer.in_proj.kernel[...].T, want["layers.0.mixer.in_proj.weight"]
        )
    assert model.drop_path.deterministic  # eval mode


@needs_torch
def test_into_a_pruned_model(save, state_dict, tiny):
    pruning = Pruning(after_blocks=(1,), keep_ratio=0.5)
    model = load_torch_checkpoint(save(model=state_dict), "vim_tiny", pruning=pruning, **tiny)
    assert model.keep_counts == {1: 8}


@needs_torch
def test_a_bare_state_dict_and_a_state_dict_entry(save, state_dict):
    for entries in (state_dict, {"state_dict": state_dict}):
        read = read_state_dict(save(**entries))
        assert read.keys() == state_dict.keys()
        np.testing.assert_array_equal(read["cls_token"], state_dict["cls_token"])


@needs_torch
def test_half_precision(save, state_dict):
    import torch

    halved = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in state_dict.items()}
    assert read_state_dict(save(model=halved))["cls_token"].dtype == np.float32


@needs_torch
def test_no_averaged_weights(save, state_dict):
    with pytest.raises(InputError, match=r"holds no model_ema \(it has model, epoch\); pass ema=False"):
        read_state_dict(save(model=state_dict, epoch=3), ema=True)


@needs_torch
@pytest.mark.parametrize(
    "entries", [{"epoch": 3}, {"model": [1, 2]}, {"model": {"epoch": 3}}, {"model": {}}, {}], ids=str
)
def test_no_weights(save, entries):
    with pytest.raises(InputError, match="checkpoint.pth holds no weights"):
        read_state_dict(save(**entries))


@needs_torch
def test_not_a_dictionary(tmp_path):
    import torch

    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth holds no weights.*found a list"):
        read_state_dict(tmp_path / "list.pth")


@needs_torch
def test_truncated(save, state_dict):
    path = save(model=state_dict)
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="cannot be read as a PyTorch checkpoint .*may be truncated"):
            read_state_dict(path)


@needs_torch
def test_not_a_checkpoint(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("page.pth", "archive.pth"):
        with pytest.raises(InputError, match=f"{name} cannot be read as a PyTorch checkpoint"):
            read_state_dict(tmp_path / name)


@needs_torch
def test_nothing_but_data_is_unpickled(tmp_path):
    import torch

    torch.save({"model": {}, "hook": print}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="cannot be read as a PyTorch checkpoint"):
        read_state_dict(tmp_path / "code.pth")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="vim_s.pth does not exist; pass the path of a .pth file"):
        read_state_dict(tmp_path / "vim_s.pth")
    with pytest.raises(InputError, match="does not exist"):
        read_state_dict(tmp_path)  # a folder


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vim_s.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs PyTorch: pip install 'top-jax\[convert\]'"):
        read_state_dict(tmp_path / "vim_s.pth")


@needs_torch
def test_another_model_is_named(save, state_dict, tiny):
    path = save(model=state_dict)
    with pytest.raises(InputError, match=r"checkpoint.pth does not fit vim_tiny: .*17 missing"):
        load_torch_checkpoint(path, "vim_tiny", **{**tiny, "depth": 3})


@needs_torch
def test_the_official_file(shared, micro):
    """The original of the fixture, through the public door."""
    model = load_torch_checkpoint(shared / "fixtures" / "vim_micro.pth", "vim_tiny", **micro.config)
    want = micro.build()
    np.testing.assert_array_equal(model.pos_embed[...], want.pos_embed[...])
    np.testing.assert_array_equal(model.blocks[3].mixer.backward.A_log[...], want.blocks[3].mixer.backward.A_log[...])


def test_the_fixture_is_the_shared_one(shared, fixtures):
    for name in ("vim_micro.npz", "selective_scan.npz"):
        with np.load(fixtures / name) as ours, np.load(shared / "fixtures" / name) as original:
            assert set(original.files) <= set(ours.files)
            for key in original.files:
                np.testing.assert_array_equal(ours[key], original[key])
