"""Our weights as official files: bit for bit what was loaded, and never half a file."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import top_jax
from top_jax.convert import load_state_dict, state_dict_of
from top_jax.errors import InputError
from top_jax.models.weights import KINDS

ENTRIES = {"vim_tiny": "model", "plain_mamba_l1": "state_dict", "deit_tiny": "model"}
SUFFIXES = [pytest.param(".pth", marks=pytest.mark.torch), pytest.param(".pt", marks=pytest.mark.torch), ".safetensors"]


def loaded(family, state_dict=None):
    model = family.model()
    load_state_dict(model, family.state_dict if state_dict is None else state_dict)
    return model


def assert_same_arrays(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name  # -0 and subnormals too


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(family, tmp_path, suffix):
    """Through a file, and what the model computes with."""
    source = dict(family.state_dict)
    name = next(name for name in source if name.endswith("in_proj.weight") or name.endswith("qkv.weight"))
    source[name] = source[name].copy()
    source[name].flat[:4] = [3e38, -0.0, 1e-30, 1e-42]
    model, path = loaded(family, source), tmp_path / f"model{suffix}"
    top_jax.save_torch_checkpoint(model, path)
    back = top_jax.load_torch_checkpoint(path, family.name, **family.sizes)
    assert_same_arrays(state_dict_of(back), source)
    ours, theirs = (nnx.to_pure_dict(nnx.state(m, KINDS)) for m in (model, back))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert os.listdir(tmp_path) == [path.name]  # nothing temporary is left


@pytest.mark.torch
def test_what_torch_finds_in_it(family, tmp_path):
    """The entry that the official code reads, with tensors as its own: contiguous, int64 counts."""
    import torch

    top_jax.save_torch_checkpoint(loaded(family), tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(content) == [ENTRIES[family.name]]
    tensors = content[ENTRIES[family.name]]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same_arrays({name: tensor.numpy() for name, tensor in tensors.items()}, family.state_dict)


def test_what_safetensors_finds_in_it(family, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    top_jax.save_torch_checkpoint(loaded(family), tmp_path / "model.safetensors")
    assert_same_arrays(numpy.load_file(tmp_path / "model.safetensors"), family.state_dict)


def test_another_dtype_of_computation_changes_nothing(family_case):
    case = family_case("vim_tiny")
    model = case.model(dtype=jnp.bfloat16)
    load_state_dict(model, case.state_dict)
    assert_same_arrays(state_dict_of(model), case.state_dict)


def test_a_file_that_is_there(family_case, tmp_path):
    model, path = loaded(family_case("vim_tiny")), tmp_path / "model.safetensors"
    path.write_text("precious")
    with pytest.raises(InputError, match=r"model.safetensors exists; .*overwrite=True, --overwrite"):
        top_jax.save_torch_checkpoint(model, path)
    assert path.read_text() == "precious"
    top_jax.save_torch_checkpoint(model, path, overwrite=True)
    assert_same_arrays(
        state_dict_of(top_jax.load_torch_checkpoint(path, "vim_tiny", **family_case("vim_tiny").sizes)),
        family_case("vim_tiny").state_dict,
    )


@pytest.mark.parametrize("name", ["model.bin", "model"])
def test_another_suffix(family_case, tmp_path, name):
    with pytest.raises(InputError, match=r"has the suffix '.*'; needed: one of .pth, .pt, .safetensors"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_such_folder(family_case, tmp_path, suffix):
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\); choose another place"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), tmp_path / "nowhere" / f"model{suffix}")


@pytest.mark.torch
def test_a_disk_that_is_full(family_case, tmp_path, monkeypatch):
    """PyTorch's writer says so in its own way; the file that was there stays."""
    import torch

    path = tmp_path / "model.pth"
    path.write_text("precious")

    def save(content, stream):
        stream.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing\nframe #0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=r"model.pth cannot be written \(\[enforce .* failed writing\); choose"):
        top_jax.save_torch_checkpoint(loaded(family_case("vim_tiny")), path, overwrite=True)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["model.pth"]
