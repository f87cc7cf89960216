"""Checkpoint files: which format, and writing one whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from top_jax import files
from top_jax.convert import safetensors_file, torch_file
from top_jax.errors import InputError

FORMATS: Final = {".pth": torch_file, ".pt": torch_file, ".safetensors": safetensors_file}


def is_file_name(path: str | Path) -> bool:
    """Whether a path is that of a checkpoint file by its suffix."""
    return Path(path).suffix.lower() in FORMATS


def check_target(path: str | Path, *, overwrite: bool) -> None:
    """Raises InputError where a file of this name cannot be one of ours, or is there and must not be replaced."""
    path = Path(path)
    if not is_file_name(path):
        raise InputError(f"{path} has the suffix {path.suffix!r}; needed: one of {', '.join(FORMATS)}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or overwrite it (overwrite=True, --overwrite).")


def read_state_dict(path: str | Path, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint file, as numpy arrays by official name, each in its own dtype.

    Args:
        path: a .safetensors file; anything else is taken for PyTorch's.
        ema: read the averaged weights, `model_ema` of a .pth file.

    Raises:
        InputError: no file, a package that is missing, a file that is not a checkpoint, or one without the weights
            asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; pass the path of a .pth or .safetensors file.")
    return FORMATS.get(path.suffix.lower(), torch_file).read(path, ema)


def write_state_dict(
    path: str | Path, state_dict: Mapping[str, np.ndarray], *, entry: str, overwrite: bool = False
) -> None:
    """Writes C-contiguous arrays as a checkpoint file.

    Args:
        path: where; its suffix decides the format.
        state_dict: by official name.
        entry: where a .pth file has them.
        overwrite: replace a file that is there.

    Raises:
        InputError: another suffix, a missing package, a file that is there, or one that cannot be written.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    with new_file(path) as temporary:
        FORMATS[path.suffix.lower()].write(temporary, state_dict, entry)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; what was written there becomes `path` if nothing is raised, else it goes.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with files.new_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place.") from error
