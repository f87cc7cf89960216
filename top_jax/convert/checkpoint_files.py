"""Reads and writes checkpoint files, .pth and .safetensors, as numpy arrays by official name.

A .pth file is a pickle: reading it needs PyTorch, and nothing but plain values is unpickled. A .safetensors file is a
flat state_dict that cannot run anything, and needs no PyTorch.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError
from top_jax.files import requested_file
from top_jax.optional import optional_package
from top_jax.values import refused

SUFFIXES: Final = (".pth", ".pt", ".safetensors")
SAFETENSORS: Final = ".safetensors"
HUGGING_FACE: Final = ("model.safetensors", "pytorch_model.bin")  # files with the weights, by preference
AVERAGED: Final = ("model_ema", "state_dict_ema")  # entries of a .pth file: of DeiT's and ViM's script, of timm
CRC32: Final = "crc32"  # key in the metadata of a .safetensors file: checksum of its data, which the format lacks
# The format's names of dtypes. Its own numpy reader is not used, because it has no bfloat16.
SAFETENSORS_DTYPES: Final = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def has_checkpoint_suffix(path: str | Path) -> bool:
    """Returns whether a path names a checkpoint file, judged by its suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def check_target(path: str | Path, *, overwrite: bool) -> None:
    """Checks that a checkpoint file may be written to `path`.

    Raises:
        InputError: the suffix is not one of `SUFFIXES`, or the file exists and `overwrite` is False.
    """
    path = Path(path)
    if not has_checkpoint_suffix(path):
        raise InputError(f"{path} has the suffix {path.suffix!r}; needed: one of {', '.join(SUFFIXES)}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or overwrite it (overwrite=True, --overwrite).")


def weights_in_folder(path: str | Path) -> Path | None:
    """Returns the file with the weights of a Hugging Face folder; None if the path is another folder, or a file.

    Raises:
        InputError: the folder is not a run directory, and has weights under other names.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "checkpoints").is_dir():
        return None
    for name in HUGGING_FACE:
        if (folder / name).is_file():
            return folder / name
    if files := sorted(file.name for file in folder.iterdir() if file.is_file() and _may_hold_weights(file)):
        raise InputError(
            f"{folder} is not a run directory; it holds {', '.join(files[:5])}{', ...' * (len(files) > 5)}: pass the "
            "path of one file."
        )
    return None


def _may_hold_weights(file: Path) -> bool:
    return has_checkpoint_suffix(file) or file.name.endswith((".pth.tar", ".bin", f"{SAFETENSORS}.index.json"))


def read_state_dict(path: str | Path, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint file, each in its own dtype.

    Damage is detected by checksums, which .pth files of PyTorch >= 1.6 have, and .safetensors files that
    `write_state_dict` wrote. Older .pth files and other .safetensors files have no checksum of their values.

    Args:
        path: a .safetensors file, or a Hugging Face folder; any other suffix is read as a PyTorch file.
        ema: read the averaged weights, `model_ema` or `state_dict_ema` of a .pth file.

    Returns:
        Arrays by official name.

    Raises:
        InputError: there is no such file, a package is missing, the file is damaged or not a checkpoint, or it lacks
            the requested weights.
    """
    path = weights_in_folder(path) or Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"checkpoint {path} {problem}; pass the path of a .pth or .safetensors file.")
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan"):
        raise InputError(f"{path} is a web page, not a checkpoint: the download went wrong; download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, without the weights; fetch them with git lfs pull.")
    named = path.suffix.lower() == SAFETENSORS
    _check_suffix(path, start, named)
    return _read_safetensors(path, ema) if named else _read_pth(path, ema)


def _check_suffix(path: Path, start: bytes, is_safetensors: bool) -> None:
    """Raises InputError if the first bytes of a file belong to another format than its suffix."""
    if start.startswith(b"\x1f\x8b"):
        raise InputError(f"{path} is compressed by gzip; unpack it with gunzip.")
    if not is_safetensors and start[8:10] == b'{"':
        raise InputError(f"{path} is a .safetensors file by its content; give it that suffix.")
    if is_safetensors and start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise InputError(f"{path} is a PyTorch file by its content; give it the suffix .pth.")


def write_state_dict(
    path: str | Path,
    state_dict: Mapping[str, np.ndarray],
    *,
    entry: str,
    overwrite: bool = False,
    class_names: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Writes arrays as a checkpoint file, whole or not at all.

    Args:
        path: the file; its suffix decides the format.
        state_dict: C-contiguous arrays by official name.
        entry: the entry of a .pth file that holds them; a .safetensors file has no entries.
        overwrite: replace an existing file.
        class_names: names of the classes in the order of the logits, for `read_class_names`; None leaves them out.
        meta: plain values for an entry `meta` of a .pth file, as mmseg's have it; None for no such entry.

    Raises:
        InputError: the suffix is unknown, a package is missing, the file exists, or it cannot be written.
    """
    path = Path(path)
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names or ()):
        raise refused("class_names", class_names, "a name for each class, as a sequence of strings")
    check_target(path, overwrite=overwrite)
    write = _write_safetensors if path.suffix.lower() == SAFETENSORS else _write_pth
    with requested_file(path) as temporary:
        write(temporary, state_dict, entry, class_names, meta)


def read_class_names(path: str | Path) -> tuple[str, ...] | None:
    """Reads the class names that `write_state_dict` stored, in the order of the logits; None if there are none.

    The entry `class_names` of a .pth file, mmseg's `CLASSES` in its `meta`, or that of a .safetensors file's metadata,
    as JSON. A file that cannot be read has none: `read_state_dict` reports it.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == SAFETENSORS:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length)) if length <= path.stat().st_size else {}
            names = json.loads(header.get("__metadata__", {}).get("class_names", "null"))
        else:
            torch = _torch()
            with torch.serialization.safe_globals(_harmless()):  # "meta" loads no tensor
                content = torch.load(path, map_location="meta", weights_only=True)
            names = content.get("class_names", content.get("meta", {}).get("CLASSES"))
            names = list(names) if isinstance(names, tuple) else names
    except InputError:
        raise
    except Exception:
        return None
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if known else None


def _read_pth(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads a PyTorch file.

    Official ViM files hold `args` (an argparse.Namespace), an optimizer and `model_ema` next to `model`; those of mmcls
    hold a `meta` next to `state_dict`. Only tensors, plain containers and the values of `_harmless` are unpickled.
    """
    torch = _torch()
    try:
        file = _checked(path)
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zlib, pickle or any constructor raise
        raise _unreadable(path, error) from error
    weights = _choose_weights(content, path, ema)
    return {name: _array_of_tensor(path, name, tensor, torch) for name, tensor in weights.items()}


def _checked(path: Path) -> Path | io.BytesIO:
    """Returns the bytes for torch.load: the file, or a copy of its records once their checksums are checked.

    torch.load verifies no checksum. It also trusts the directory of the zip file: one flipped bit there can turn a
    record into a folder, whose tensor then has arbitrary values. So the copy gets a new directory.

    Raises:
        zipfile.BadZipFile: a record is damaged. Other damage may raise nearly any exception, from inside zipfile.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return path  # written by PyTorch < 1.6, or with `_use_new_zipfile_serialization=False`
        with zipfile.ZipFile(stream) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                return path  # written with `torch.serialization.set_crc32_options(False)`
            copy = io.BytesIO()
            with zipfile.ZipFile(copy, "w") as target:
                for record in records:
                    target.writestr(zipfile.ZipInfo(record.filename), archive.read(record))
    copy.seek(0)
    return copy


def _write_pth(
    path: Path,
    state_dict: Mapping[str, np.ndarray],
    entry: str,
    class_names: Sequence[str] | None,
    meta: Mapping[str, Any] | None,
) -> None:
    """Writes `{entry: state_dict}`. Raises OSError if the disk is full."""
    torch = _torch()
    content: dict[str, Any] = {} if meta is None else {"meta": dict(meta)}
    content |= {entry: {name: torch.from_numpy(array) for name, array in state_dict.items()}}
    if class_names is not None:
        content["class_names"] = list(class_names)
    with path.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # PyTorch's own writer raises it when the disk is full
            raise OSError(0, str(error).splitlines()[0]) from error


def _torch() -> Any:
    return optional_package(
        "torch",
        purpose="reading or writing a .pth file",
        install="'top-jax[convert]' (the CPU build of torch is enough), or use a .safetensors file",
    )


def _harmless() -> list[Any]:
    """Lists the types that may be unpickled besides tensors and plain containers; none of them runs code.

    NumPy's functions are listed under two names, because files written before and after NumPy 2 differ.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name not in ("ObjectDType", "VoidDType")]
    numpy_values = [
        (function, f"numpy.{module}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for module in ("core", "_core")
    ]
    paths = [  # read as pure paths, which every operating system can hold
        (getattr(pathlib, f"Pure{kind}"), f"{module}.{pure}{kind}")
        for kind in ("PosixPath", "WindowsPath")
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
    ]
    times = [datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone]
    return [argparse.Namespace, bytes, range, *times, *paths, np.dtype, np.ndarray, *dtypes, *numpy_values]


def _unreadable(path: Path, error: Exception) -> InputError:
    if found := re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error)):
        return InputError(
            f"{path} contains a {found[1]} besides its weights; it is not read, because unpickling it may run code. If "
            "you trust the file, save the weights alone, where the training code is installed: torch.save({'model': "
            "torch.load(FILE, weights_only=False)['model']}, NEW_FILE), with 'state_dict' instead of 'model' for "
            "PlainMamba."
        )
    lines = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    reason = (lines.strip().splitlines() or ["it ends too early"])[0]
    return InputError(f"{path} cannot be read as a PyTorch checkpoint ({reason}); it may be truncated.")


def _choose_weights(content: Any, path: Path, ema: bool) -> dict[str, Any]:
    """Returns the state_dict of an unpickled file: an entry of `AVERAGED`, `model` or `state_dict`, or all."""
    found = content if isinstance(content, dict) else {}
    held = ", ".join(map(str, found)) if isinstance(content, dict) else f"a {type(content).__name__}"
    if ema:
        entry = next((entry for entry in AVERAGED if entry in found), None)
        if entry is None:
            raise InputError(
                f"{path} has no {' or '.join(AVERAGED)} (it has {held or 'nothing'}); drop --ema (ema=False)."
            )
        weights = found[entry]
    else:
        weights = found.get("model", found.get("state_dict", found))
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not weights or not all(hasattr(a, "detach") for a in weights.values()):
        raise InputError(
            f"{path} has no weights: needed are tensors by name in an entry 'model' or 'state_dict'; found: "
            f"{held or 'nothing'}."
        )
    return weights


def _array_of_tensor(path: Path, name: str, tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        if dtype == "bfloat16":  # NumPy has no bfloat16 of its own; JAX registers one
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{path} has {name} as a tensor of {dtype}, {tensor.layout}; needed: a dense tensor of float32, float16 or "
            "bfloat16."
        ) from error


def _read_safetensors(path: Path, ema: bool) -> dict[str, np.ndarray]:
    if ema:
        raise InputError(f"{path} holds one set of weights, as every .safetensors file does; drop --ema (ema=False).")
    safetensors = _safetensors("safetensors")
    content = path.read_bytes()
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} cannot be read as a .safetensors file ({error}); if it is truncated, copy or download it again."
        ) from error
    if not tensors:
        raise InputError(f"{path} has no weights; pass a file that holds tensors.")
    _check_crc32(path, content)
    return {name: _array_of_bytes(path, name, **tensor) for name, tensor in tensors}


def _write_safetensors(
    path: Path,
    state_dict: Mapping[str, np.ndarray],
    entry: str,
    class_names: Sequence[str] | None,
    meta: Mapping[str, Any] | None,
) -> None:
    del entry, meta  # the format has neither
    header, data = _split(_safetensors("safetensors.numpy").save(dict(state_dict)))
    header = {"__metadata__": {"format": "pt"}, **header}  # some readers refuse files without it
    if class_names is not None:
        header["__metadata__"]["class_names"] = json.dumps(list(class_names))
    header["__metadata__"][CRC32] = _crc32(header, data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, as the package safetensors does
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Returns the header and the data of a whole .safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), memoryview(content)[end:]


def _crc32(header: Mapping[str, Any], data: memoryview) -> str:
    """Returns the checksum of a .safetensors file without its own entry, in eight hexadecimal digits."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != CRC32}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode()
    return f"{zlib.crc32(data, zlib.crc32(text)):08x}"


def _check_crc32(path: Path, content: bytes) -> None:
    header, data = _split(content)
    stored = header.get("__metadata__", {}).get(CRC32)
    if stored is not None and stored != _crc32(header, data):
        raise InputError(
            f"{path} is damaged: its checksum does not match. Restore it from a copy; if another program changed the "
            f"weights, and copied the metadata, leave {CRC32!r} out of them."
        )


def _safetensors(module: str) -> Any:
    return optional_package(
        module,
        purpose="reading or writing a .safetensors file",
        install="safetensors (or 'top-jax[convert]', for .pth files too)",
    )


def _array_of_bytes(path: Path, name: str, dtype: str, shape: list[int], data: bytes | bytearray) -> np.ndarray:
    if dtype not in SAFETENSORS_DTYPES:
        raise InputError(f"{path} has {name} as {dtype}; needed: F32, F16, BF16 or F64 (for counts: an integer).")
    return np.frombuffer(data, SAFETENSORS_DTYPES[dtype]).reshape(shape)
