"""Reading and writing .safetensors files, for which no torch is needed."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from top_jax.convert import load_torch_checkpoint, save_torch_checkpoint
from top_jax.convert.files import read_state_dict, write_state_dict
from top_jax.errors import InputError

pytest.importorskip("safetensors")


def raw(header: dict[str, object], data: bytes = b"") -> bytes:
    """The format, by hand."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_without_torch(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    path = tmp_path / "model.safetensors"
    write_state_dict(path, family.state_dict, entry="unused")
    model = load_torch_checkpoint(path, family.name, **family.sizes)
    save_torch_checkpoint(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_format_by_hand(tmp_path):
    """Flat, by official name, little-endian; `format` is what transformers and others ask for."""
    path = tmp_path / "model.safetensors"
    write_state_dict(path, {"b": np.asarray([1.0, 2.0], np.float32), "n": np.asarray(7, np.int64)}, entry="model")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"} and header.keys() == {"b", "n"}
    assert (header["n"]["dtype"], header["n"]["shape"]) == ("I64", [])
    assert (header["b"]["dtype"], header["b"]["shape"]) == ("F32", [2])
    start, end = header["b"]["data_offsets"]
    np.testing.assert_array_equal(np.frombuffer(data[start:end], "<f4"), [1, 2])


def test_every_dtype(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {
        "F32": np.float32([1.5]),
        "F16": np.float16([0.1]),
        "BF16": np.asarray([1.5, -2.25], jnp.bfloat16),
        "F64": np.float64([[0.1], [0.2]]),
        "I64": np.int64([2**60]),
    }
    header, data = {}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": name, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    path.write_bytes(raw(header, data))
    read = read_state_dict(path)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.torch
def test_what_the_package_for_torch_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.tensor([1.5, -2.25], dtype=torch.bfloat16), "n": torch.tensor(3)}
    save_file(tensors, path)
    read = read_state_dict(path)
    np.testing.assert_array_equal(read["a"].astype(np.float32), [1.5, -2.25])
    assert read["n"].dtype == np.int64 and read["n"] == 3


def test_half_precision_is_widened(family, tmp_path):
    path = tmp_path / "model.safetensors"
    rounded = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in family.state_dict.items()}
    write_state_dict(path, rounded, entry="unused")
    model = load_torch_checkpoint(path, family.name, **family.sizes)
    (name,) = (name for name in rounded if name in ("head.bias", "head.fc.bias"))
    assert model.head.bias[...].dtype == jnp.float32
    np.testing.assert_array_equal(model.head.bias[...], rounded[name].astype(np.float32))


def test_unknown_dtypes(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a.b": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"xy"))
    with pytest.raises(InputError, match="model.safetensors holds a.b as F8_E4M3; needed: F32, F16, BF16 or F64"):
        read_state_dict(path)


def test_not_a_file_of_ours(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    for content in (b"", b"1234567", b"<!DOCTYPE html>" * 9, whole[:-1], whole + b"x", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a .safetensors file .*may be truncated"):
            read_state_dict(path)
    path.write_bytes(raw({}))
    with pytest.raises(InputError, match="model.safetensors holds no weights"):
        read_state_dict(path)


def test_it_has_one_set_of_weights(family, tmp_path):
    path = tmp_path / "model.safetensors"
    write_state_dict(path, family.state_dict, entry="unused")
    with pytest.raises(InputError, match="holds one set of weights.*drop --ema"):
        load_torch_checkpoint(path, family.name, ema=True, **family.sizes)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    needed = r"needs the package safetensors: pip install safetensors, or 'top-jax\[convert\]'"
    with pytest.raises(InputError, match=needed):
        read_state_dict(path)
    with pytest.raises(InputError, match=needed):
        write_state_dict(tmp_path / "new.safetensors", {"a": np.zeros(1)}, entry="model")
    assert not (tmp_path / "new.safetensors").exists()
