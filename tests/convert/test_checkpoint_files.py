"""Checkpoint files: .pth as PyTorch writes it, and .safetensors, which needs no PyTorch."""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.util
import json
import os
import pathlib
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import filled

from top_jax.convert import load_state_dict, load_torch_checkpoint, save_torch_checkpoint, state_dict_of
from top_jax.convert.checkpoint_files import read_state_dict, weights_in_folder, write_state_dict
from top_jax.errors import InputError
from top_jax.models import abstract_model
from top_jax.pruning import Pruning
from top_jax.training.weights import load_checkpoint

needs_torch = pytest.mark.torch
needs_safetensors = pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs safetensors")


@needs_torch
def test_a_real_training_checkpoint(save, state_dict, tiny):
    """The ViM authors' script writes a Namespace, an optimizer and averaged weights next to `model`."""
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
    assert [cut.after for cut in model.schedule] == [8]


@needs_torch
def test_a_checkpoint_of_timm(save, state_dict, tmp_path):
    averaged = {name: array + 1 for name, array in state_dict.items()}
    path = save(state_dict=state_dict, state_dict_ema=averaged, arch="vim", epoch=3)
    path = path.rename(tmp_path / "model_best.pth.tar")
    for ema, want in ((False, state_dict), (True, averaged)):
        np.testing.assert_array_equal(read_state_dict(path, ema=ema)["cls_token"], want["cls_token"])


@needs_torch
def test_a_bare_state_dict_and_a_state_dict_entry(save, state_dict):
    for entries in (state_dict, {"state_dict": state_dict}):
        read = read_state_dict(save(**entries))
        assert read.keys() == state_dict.keys()
        np.testing.assert_array_equal(read["cls_token"], state_dict["cls_token"])


@needs_torch
def test_every_dtype_as_it_is(save):
    """bfloat16, which numpy does not know, and scalars too."""
    import torch

    tensors = {
        "bfloat16": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "float16": torch.tensor([[0.1]], dtype=torch.float16),
        "float64": torch.tensor([0.1], dtype=torch.float64),
        "int64": torch.tensor(2**60),
        "view": torch.arange(6.0).reshape(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    read = read_state_dict(save(model=tensors))
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        np.testing.assert_array_equal(read[name].astype(np.float64), tensor.detach().double().numpy())
    assert [read[name].dtype for name in ("bfloat16", "scalar")] == [jnp.bfloat16] * 2
    assert (read["float16"].dtype, read["float64"].dtype, read["int64"].dtype) == (np.float16, np.float64, np.int64)


@needs_torch
def test_tensors_that_are_no_plain_arrays(save):
    import torch

    for tensor, what in (
        (torch.ones(3).to_sparse(), "float32, torch.sparse_coo"),
        (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ):
        with pytest.raises(InputError, match=f"checkpoint.pth .* a.b .*{what}"):
            read_state_dict(save(model={"a.b": tensor}))


def mmcls_meta():
    """Returns what mmcv's runner and mmcls store next to the weights, and what a user's script may."""
    return {
        "env_info": "sys.platform: linux\nPython: 3.8.13",
        "config": "model = dict(\n    type='ImageClassifier')",
        "CLASSES": ["tench", "goldfish"],
        "PALETTE": None,
        "seed": 42,
        "time": "Mon Nov 23 16:00:00 2026",
        "epoch": 300,
        "hook_msgs": {"best_score": np.float64(81.6), "best_ckpt": "work_dirs/best.pth", "last": np.int64(3)},
        "numpy": [np.float32(1.5), np.bool_(True), np.str_("text"), np.arange(4.0), np.zeros((2, 0), np.int8)],
        "started": datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC),
        "took": datetime.timedelta(hours=30),
        "work_dir": pathlib.PurePosixPath("/work_dirs"),
        "here": pathlib.Path("work_dirs"),
        "gpu_ids": range(8),
        "options": argparse.Namespace(launcher="pytorch"),
    }


@needs_torch
def test_a_checkpoint_of_mmcls(save, family_case):
    case = family_case("plain_mamba_l1")
    entries = {"meta": mmcls_meta(), "state_dict": OrderedDict(case.state_dict), "optimizer": {"state": {}}}
    path = save(**entries)
    model = load_torch_checkpoint(path, case.name, **case.sizes)
    np.testing.assert_array_equal(model.norm.bias[...], case.state_dict["backbone.ln1.bias"])

    # As pickled under numpy 1, whose modules had other names.
    old = path.with_name("old.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("/data.pkl"):
                assert content.count(b"numpy._core.multiarray") >= 2
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, content)
    assert read_state_dict(old).keys() == case.state_dict.keys()


@needs_torch
def test_no_averaged_weights(save, state_dict):
    with pytest.raises(InputError, match=r"no model_ema .*\(it has model, epoch\)"):
        read_state_dict(save(model=state_dict, epoch=3), ema=True)


@needs_torch
@pytest.mark.parametrize(
    "entries", [{"epoch": 3}, {"model": [1, 2]}, {"model": {"epoch": 3}}, {"model": {}}, {}], ids=str
)
def test_no_weights(save, entries):
    with pytest.raises(InputError, match="checkpoint.pth"):
        read_state_dict(save(**entries))


@needs_torch
def test_not_a_dictionary(tmp_path):
    import torch

    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list.pth .* a list"):
        read_state_dict(tmp_path / "list.pth")


@needs_torch
def test_truncated(save, state_dict):
    path = save(model=state_dict)
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="checkpoint.pth .*truncated"):
            read_state_dict(path)


def flipped(content: bytes, bits: np.ndarray) -> Iterator[bytes]:
    """Yields copies of a file with one bit flipped."""
    for bit in bits.tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def damaged(content: bytes, seed: int = 0) -> Iterator[bytes]:
    """Yields 400 copies with a flipped bit, at least half of them in the headers, and 50 that end too early or late."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(len(content), size=40)
    yield from (content[:size] for size in sizes)
    yield from (content + bytes(range(size)) for size in range(1, 11))
    yield from flipped(content, rng.integers(8 * len(content), size=200))
    headers = [8 * rng.integers(start, stop, size=100) + rng.integers(8, size=100) for start, stop in ends(content)]
    yield from flipped(content, np.concatenate(headers))


def ends(content: bytes) -> list[tuple[int, int]]:
    """The first and the last 2,000 bytes: the header of .safetensors, the records and the directory of .pth."""
    return [(0, min(2000, len(content))), (max(0, len(content) - 2000), len(content))]


@pytest.mark.parametrize(
    "suffix", [pytest.param(".pth", marks=needs_torch), pytest.param(".safetensors", marks=needs_safetensors)]
)
def test_no_damage_changes_weights(tmp_path, suffix):
    """Every damaged copy gives the same weights or one InputError."""
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, d_state=2, num_classes=2)
    model = filled(abstract_model("vim_tiny", **sizes), scale=0.3)
    path, want = tmp_path / f"model{suffix}", state_dict_of(model)
    save_torch_checkpoint(model, path)
    refused = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            read = read_state_dict(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        if read.keys() != want.keys():
            with pytest.raises(InputError):
                load_state_dict(model, read)
            continue
        for name, array in want.items():
            assert read[name].dtype == array.dtype and read[name].shape == array.shape
            assert read[name].tobytes() == array.tobytes()
    assert refused > 200


@needs_torch
def test_damage_of_an_old_file(tmp_path, state_dict):
    """The format of PyTorch < 1.6 has no checksum: it loads, or it is one InputError."""
    import torch

    path = tmp_path / "old.pth"
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items() if "layers" not in name}
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=False)
    assert read_state_dict(path).keys() == tensors.keys()
    refused = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            read_state_dict(path)
        except InputError:
            refused += 1
    assert refused > 50


@needs_torch
def test_a_record_marked_as_a_folder(save, state_dict):
    """One flipped bit in the zip's directory; PyTorch alone returns other numbers without an error."""
    path = save(model=state_dict)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/3")) + 38] ^= 1 << 4
    path.write_bytes(content)
    for name, array in read_state_dict(path).items():
        np.testing.assert_array_equal(array, state_dict[name])


@needs_torch
def test_a_file_without_checksums(save, state_dict):
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        path = save(model=state_dict)
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(read_state_dict(path)["cls_token"], state_dict["cls_token"])


def test_a_git_lfs_pointer(tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 28\n")
        with pytest.raises(InputError, match=rf"model{suffix} .*git lfs pull"):
            read_state_dict(path)


@needs_safetensors
def test_another_format_than_the_suffix_says(state_dict, tmp_path):
    file = tmp_path / "model.safetensors"
    write_state_dict(file, state_dict, entry="unused")
    for content, suffix, message in (
        (gzip.compress(b"weights"), ".pth", "gunzip"),
        (file.read_bytes(), ".pth", r"is a \.safetensors file by its content"),
        (b"PK\x03\x04 a zip", ".safetensors", r"the suffix \.pth"),
        (b"\x80\x02 a pickle", ".safetensors", r"the suffix \.pth"),
    ):
        wrong = tmp_path / f"wrong{suffix}"
        wrong.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_state_dict(wrong)


@needs_safetensors
def test_a_hugging_face_folder(family, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    write_state_dict(tmp_path / "model.safetensors", family.state_dict, entry="unused")
    (tmp_path / "model.pth").write_bytes(b"not read")
    assert weights_in_folder(tmp_path) == tmp_path / "model.safetensors"
    model = load_torch_checkpoint(tmp_path, family.name, **family.sizes)
    for name, array in state_dict_of(model).items():
        np.testing.assert_array_equal(array, family.state_dict[name])
    with pytest.raises(InputError, match=r"model\.safetensors.*load_torch_checkpoint"):
        load_checkpoint(tmp_path)


@needs_torch
def test_a_hugging_face_folder_of_pickles(save, state_dict, tmp_path):
    save(**state_dict).rename(tmp_path / "pytorch_model.bin")
    assert read_state_dict(tmp_path).keys() == state_dict.keys()


def test_other_folders(tmp_path):
    assert weights_in_folder(tmp_path) is None and weights_in_folder(tmp_path / "absent") is None
    (tmp_path / "vim_t.pth").write_bytes(b"")
    with pytest.raises(InputError, match="vim_t.pth"):
        weights_in_folder(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # a run directory, with an export in it
    assert weights_in_folder(tmp_path) is None


@needs_torch
def test_not_a_checkpoint(tmp_path):
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("page.pth", "archive.pth"):
        with pytest.raises(InputError, match=f"{name} (cannot be read|is a web page)"):
            read_state_dict(tmp_path / name)


@needs_torch
def test_nothing_but_data_is_unpickled(tmp_path):
    import torch

    for thing, name in ((print, "print"), (os.system, "posix.system"), (np.frompyfunc, "numpy.frompyfunc")):
        torch.save({"model": {}, "hook": thing}, tmp_path / "code.pth")
        with pytest.raises(InputError, match=f"code.pth .* {name} "):
            read_state_dict(tmp_path / "code.pth")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="vim_s.pth"):
        read_state_dict(tmp_path / "vim_s.pth")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        read_state_dict(tmp_path)  # a folder


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vim_s.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.pth .* torch: pip install 'top-jax\[convert\]'.*\.safetensors"):
        read_state_dict(tmp_path / "vim_s.pth")
    with pytest.raises(InputError, match=r"\.pth .* torch"):
        write_state_dict(tmp_path / "vim_s.pt", {}, entry="model")


@needs_torch
def test_another_model_is_named(save, state_dict, tiny):
    path = save(model=state_dict)
    with pytest.raises(InputError, match=r"checkpoint.pth has depth=2, but the model has depth=3"):
        load_torch_checkpoint(path, "vim_tiny", **{**tiny, "depth": 3})
    with pytest.raises(InputError, match=r"checkpoint.pth .*deit_tiny: .* missing"):
        load_torch_checkpoint(path, "deit_tiny")


@needs_torch
@pytest.mark.parametrize("name", ["vim_micro", "plain_mamba_micro", "deit_micro"])
def test_the_official_file(name, shared, official_case, tmp_path):
    """Loads the original of the fixture through the public API and saves it: the same tensors in the same entries."""
    import torch

    case = official_case(name)
    path = shared / "fixtures" / f"{name}.pth"
    model = load_torch_checkpoint(path, case.model_name, **case.config)
    want, got = state_dict_of(case.build()), state_dict_of(model)
    assert want.keys() == got.keys()
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array)

    save_torch_checkpoint(model, tmp_path / "back.pth")
    original, back = torch.load(path), torch.load(tmp_path / "back.pth")
    assert original.keys() == back.keys()
    for entry, tensors in original.items():
        assert tensors.keys() == back[entry].keys()
        for key, tensor in tensors.items():
            assert back[entry][key].dtype == tensor.dtype and torch.equal(back[entry][key], tensor), key


def test_the_fixture_is_the_shared_one(shared, fixtures):
    for name in ("vim_micro", "plain_mamba_micro", "selective_scan"):
        with np.load(fixtures / f"{name}.npz") as ours, np.load(shared / "fixtures" / f"{name}.npz") as original:
            # The shared gradients lack the prefix of the backbone; the sizes are named as ours are.
            renamed = {key: key for key in original.files if key != "config"}
            if name == "plain_mamba_micro":
                renamed |= {key: key.replace("grad/", "grad/backbone.") for key in renamed if key.startswith("grad/")}
            assert set(renamed.values()) <= set(ours.files)
            for key, here in renamed.items():
                np.testing.assert_array_equal(ours[here], original[key])


def raw(header: dict[str, object], data: bytes = b"") -> bytes:
    """The format, by hand."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@needs_safetensors
def test_safetensors_without_torch(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    path = tmp_path / "model.safetensors"
    write_state_dict(path, family.state_dict, entry="unused")
    model = load_torch_checkpoint(path, family.name, **family.sizes)
    save_torch_checkpoint(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@needs_safetensors
def test_the_format_by_hand(tmp_path):
    """Flat, by official name, little-endian; transformers and others require `format`."""
    path = tmp_path / "model.safetensors"
    write_state_dict(path, {"b": np.asarray([1.0, 2.0], np.float32), "n": np.asarray(7, np.int64)}, entry="model")
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert header.pop("__metadata__")["format"] == "pt" and header.keys() == {"b", "n"}
    assert (header["n"]["dtype"], header["n"]["shape"]) == ("I64", [])
    assert (header["b"]["dtype"], header["b"]["shape"]) == ("F32", [2])
    start, end = header["b"]["data_offsets"]
    np.testing.assert_array_equal(np.frombuffer(data[start:end], "<f4"), [1, 2])


@needs_safetensors
def test_every_dtype_of_safetensors(tmp_path):
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
@needs_safetensors
def test_what_the_package_for_torch_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.tensor([1.5, -2.25], dtype=torch.bfloat16), "n": torch.tensor(3)}
    save_file(tensors, path)
    read = read_state_dict(path)
    np.testing.assert_array_equal(read["a"].astype(np.float32), [1.5, -2.25])
    assert read["n"].dtype == np.int64 and read["n"] == 3


@needs_safetensors
def test_half_precision_is_widened(family, tmp_path):
    path = tmp_path / "model.safetensors"
    rounded = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in family.state_dict.items()}
    write_state_dict(path, rounded, entry="unused")
    model = load_torch_checkpoint(path, family.name, **family.sizes)
    (name,) = (name for name in rounded if name in ("head.bias", "head.fc.bias"))
    assert model.head.bias[...].dtype == jnp.float32
    np.testing.assert_array_equal(model.head.bias[...], rounded[name].astype(np.float32))


@needs_safetensors
def test_unknown_dtypes_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a.b": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"xy"))
    with pytest.raises(InputError, match="model.safetensors .* a.b .*F8_E4M3"):
        read_state_dict(path)


@needs_safetensors
def test_damaged_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    for content in (b"", b"1234567", b"<!DOCTYPE html>" * 9, whole[:-1], whole + b"x", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="model.safetensors .*(truncated|web page)"):
            read_state_dict(path)
    ends = {"overlapping": (4, 8), "past the end": (8, 16), "with a gap": (9, 13), "backwards": (12, 8)}
    for offsets in ends.values():
        two = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        path.write_bytes(raw(two | {"b": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}, bytes(13)))
        with pytest.raises(InputError, match="model.safetensors"):
            read_state_dict(path)
    for header in (b"\xff\xfe", b"[]", b"null", b'{"a": 1}', b'{"a":' * 5000, b'{"__metadata__": 3}', b"{" + b" " * 99):
        for size in (len(header), 2**63, 2**64 - 1):
            path.write_bytes(size.to_bytes(8, "little") + header)
            with pytest.raises(InputError, match="model.safetensors"):
                read_state_dict(path)
    path.write_bytes(raw({}))
    with pytest.raises(InputError, match="model.safetensors"):
        read_state_dict(path)


@needs_safetensors
def test_safetensors_have_no_averaged_weights(family, tmp_path):
    path = tmp_path / "model.safetensors"
    write_state_dict(path, family.state_dict, entry="unused")
    with pytest.raises(InputError, match="model.safetensors .* --ema"):
        load_torch_checkpoint(path, family.name, ema=True, **family.sizes)


def test_without_the_safetensors_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    needed = r"\.safetensors .* pip install safetensors .*top-jax\[convert\]"
    with pytest.raises(InputError, match=needed):
        read_state_dict(path)
    with pytest.raises(InputError, match=needed):
        write_state_dict(tmp_path / "new.safetensors", {"a": np.zeros(1)}, entry="model")
    assert not (tmp_path / "new.safetensors").exists()
