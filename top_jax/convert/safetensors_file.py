"""Reads and writes .safetensors files: a flat state_dict, and nothing that could run. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import jax.numpy as jnp
import numpy as np

from top_jax.errors import InputError

# The format's names. Its own numpy reader is not used: it has no bfloat16.
DTYPES: Final = {
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


def read(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """Every tensor of the file.

    Raises:
        InputError: no safetensors package, not such a file, `ema`, or a dtype that no checkpoint of ours has.
    """
    if ema:
        raise InputError(f"{path} holds one set of weights, as every .safetensors file; drop --ema (ema=False).")
    safetensors = _package()
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} cannot be read as a .safetensors file ({error}); it may be truncated.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not tensors:
        raise InputError(f"{path} holds no weights.")
    return {name: _array(path, name, **tensor) for name, tensor in tensors}


def write(path: Path, state_dict: Mapping[str, np.ndarray], entry: str) -> None:
    """Writes C-contiguous arrays; the format has no entries, so that `entry` is not used."""
    _package()
    from safetensors.numpy import save  # pyright: ignore[reportMissingImports]  an extra

    path.write_bytes(save(dict(state_dict), metadata={"format": "pt"}))  # without which some readers refuse it


def _array(path: Path, name: str, dtype: str, shape: list[int], data: bytes | bytearray) -> np.ndarray:
    if dtype not in DTYPES:
        raise InputError(f"{path} holds {name} as {dtype}; needed: F32, F16, BF16 or F64 (counts: an integer).")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _package() -> ModuleType:
    try:
        import safetensors  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise InputError(
            "a .safetensors file needs the package safetensors: pip install safetensors, or 'top-jax[convert]' for "
            "PyTorch's files too."
        ) from error
    return safetensors
