"""Reads and writes PyTorch's .pth files. The only module that needs torch."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError


def read(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint, as numpy arrays by official name, each in its own dtype.

    Real ViM files hold `args` (an argparse.Namespace), an optimizer and `model_ema` beside `model`, those of mmcls a
    `meta` beside `state_dict`; nothing but tensors, plain containers and what `_harmless` lists is unpickled.

    Args:
        path: a file.
        ema: read the averaged weights (`model_ema`) instead of the trained ones.

    Raises:
        InputError: no torch, a file that is not a checkpoint, or one without the weights asked for.
    """
    torch = _package()
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error
    return {name: _array(path, name, tensor) for name, tensor in _choose(content, path, ema).items()}


def write(path: Path, state_dict: Mapping[str, np.ndarray], entry: str) -> None:
    """Writes `{entry: state_dict}`; raises OSError where that cannot be done."""
    torch = _package()
    content = {entry: {name: torch.from_numpy(array) for name, array in state_dict.items()}}
    with path.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # of its own writer, on a full disk
            raise OSError(0, str(error).splitlines()[0]) from error


def _package() -> ModuleType:
    try:
        import torch  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise InputError(
            ".pth files need PyTorch: pip install 'top-jax[convert]' (the CPU build of torch is enough), or use a "
            ".safetensors file, which does not."
        ) from error
    return torch


def _harmless() -> list[Any]:
    """What may be unpickled beside tensors and plain containers: values, none of which runs anything.

    Numpy's functions by both names that files know them by, from before and after numpy 2.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name not in ("ObjectDType", "VoidDType")]
    numpy_values = [
        (function, f"numpy.{module}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for module in ("core", "_core")
    ]
    paths = [  # as names, which any system can hold of any other
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
            f"{path} holds a {found[1]} beside its weights, which is not read since unpickling it may run code; where "
            "you trust the file, save its weights alone: with PyTorch and what made it, torch.save({'model': "
            "torch.load(FILE, weights_only=False)['model']}, NEW_FILE), or 'state_dict' for 'model'."
        )
    lines = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    reason = (lines.strip().splitlines() or ["it ends too early"])[0]
    return InputError(f"{path} cannot be read as a PyTorch checkpoint ({reason}); it may be truncated.")


def _choose(content: Any, path: Path, ema: bool) -> dict[str, Any]:
    found = content if isinstance(content, dict) else {}
    held = ", ".join(map(str, found)) if isinstance(content, dict) else f"a {type(content).__name__}"
    if ema:
        if "model_ema" not in found:
            raise InputError(f"{path} holds no model_ema (it has {held or 'nothing'}); drop --ema (ema=False).")
        weights = found["model_ema"]
    else:
        weights = found.get("model", found.get("state_dict", found))
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not weights or not all(hasattr(a, "detach") for a in weights.values()):
        raise InputError(
            f"{path} holds no weights: it needs tensors by name in a 'model' or 'state_dict' entry, found "
            f"{held or 'nothing'}."
        )
    return weights


def _array(path: Path, name: str, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        if dtype == "bfloat16":  # which numpy has only by JAX's leave
            return tensor.view(_package().int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"{path} holds {name} as a tensor of {dtype}, {tensor.layout}, which is no plain array; needed: dense "
            "float32, float16 or bfloat16."
        ) from error
