"""Reads and writes checkpoint files, .pth and .safetensors, as numpy arrays by official name.

A .pth file is a pickle: reading it needs PyTorch, and nothing but plain values is unpickled. A .safetensors file is a
flat state_dict that cannot run anything, and needs no PyTorch.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError
from top_jax.files import requested_file
from top_jax.optional import optional_package

SUFFIXES: Final = (".pth", ".pt", ".safetensors")
SAFETENSORS: Final = ".safetensors"
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


def read_state_dict(path: str | Path, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint file, each in its own dtype.

    Args:
        path: a .safetensors file; any other suffix is read as a PyTorch file.
        ema: read the averaged weights, `model_ema` of a .pth file.

    Returns:
        Arrays by official name.

    Raises:
        InputError: there is no such file, a package is missing, the file is not a checkpoint, or it lacks the
            requested weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; pass the path of a .pth or .safetensors file.")
    return _read_safetensors(path, ema) if path.suffix.lower() == SAFETENSORS else _read_pth(path, ema)


def write_state_dict(
    path: str | Path, state_dict: Mapping[str, np.ndarray], *, entry: str, overwrite: bool = False
) -> None:
    """Writes arrays as a checkpoint file, whole or not at all.

    Args:
        path: the file; its suffix decides the format.
        state_dict: C-contiguous arrays by official name.
        entry: the entry of a .pth file that holds them; a .safetensors file has no entries.
        overwrite: replace an existing file.

    Raises:
        InputError: the suffix is unknown, a package is missing, the file exists, or it cannot be written.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    write = _write_safetensors if path.suffix.lower() == SAFETENSORS else _write_pth
    with requested_file(path) as temporary:
        write(temporary, state_dict, entry)


def _read_pth(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Reads a PyTorch file.

    Official ViM files hold `args` (an argparse.Namespace), an optimizer and `model_ema` next to `model`; those of mmcls
    hold a `meta` next to `state_dict`. Only tensors, plain containers and the values of `_harmless` are unpickled.
    """
    torch = _torch()
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error
    weights = _choose_weights(content, path, ema)
    return {name: _array_of_tensor(path, name, tensor, torch) for name, tensor in weights.items()}


def _write_pth(path: Path, state_dict: Mapping[str, np.ndarray], entry: str) -> None:
    """Writes `{entry: state_dict}`. Raises OSError if the disk is full."""
    torch = _torch()
    content = {entry: {name: torch.from_numpy(array) for name, array in state_dict.items()}}
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
    """Lists what may be unpickled besides tensors and plain containers: values, none of which runs code.

    Numpy's functions appear under both names that files know them by, from before and after numpy 2.
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
    """Returns the state_dict of an unpickled file: its entry `model_ema`, `model` or `state_dict`, or the whole."""
    found = content if isinstance(content, dict) else {}
    held = ", ".join(map(str, found)) if isinstance(content, dict) else f"a {type(content).__name__}"
    if ema:
        if "model_ema" not in found:
            raise InputError(f"{path} has no model_ema (it has {held or 'nothing'}); drop --ema (ema=False).")
        weights = found["model_ema"]
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
        if dtype == "bfloat16":  # numpy has it only as JAX's extension type
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{path} has {name} as a tensor of {dtype}, {tensor.layout}; needed: a dense tensor of float32, float16 or "
            "bfloat16."
        ) from error


def _read_safetensors(path: Path, ema: bool) -> dict[str, np.ndarray]:
    if ema:
        raise InputError(f"{path} holds one set of weights, as every .safetensors file; drop --ema (ema=False).")
    safetensors = _safetensors("safetensors")
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} cannot be read as a .safetensors file ({error}); it may be truncated.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not tensors:
        raise InputError(f"{path} has no weights.")
    return {name: _array_of_bytes(path, name, **tensor) for name, tensor in tensors}


def _write_safetensors(path: Path, state_dict: Mapping[str, np.ndarray], entry: str) -> None:
    del entry  # the format has none
    save = _safetensors("safetensors.numpy").save
    path.write_bytes(save(dict(state_dict), metadata={"format": "pt"}))  # some readers refuse files without it


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
