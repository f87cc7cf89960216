"""Reads the state_dict out of an official .pth file. The only module that needs torch."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from top_jax.errors import InputError


def read_state_dict(path: str | Path, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint, as float numpy arrays by official name.

    Real ViM files hold `args` (an argparse.Namespace), an optimizer and `model_ema` beside `model`; nothing but
    tensors, plain containers and that Namespace is unpickled.

    Args:
        path: a .pth file.
        ema: read the averaged weights (`model_ema`) instead of the trained ones.

    Raises:
        InputError: no file, no torch, a file that is not a checkpoint, or one without the weights asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; pass the path of a .pth file.")
    try:
        import torch  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: pip install 'top-jax[convert]' (the CPU build of torch is enough)."
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["it ends too early"])[0]
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint ({reason}); it may be truncated.") from error
    weights = _choose(content, path, ema)
    return {name: tensor.detach().float().numpy() for name, tensor in weights.items()}


def _choose(content: Any, path: Path, ema: bool) -> dict[str, Any]:
    found = content if isinstance(content, dict) else {}
    held = ", ".join(map(str, found)) if isinstance(content, dict) else f"a {type(content).__name__}"
    if ema:
        if "model_ema" not in found:
            raise InputError(f"{path} holds no model_ema (it has {held or 'nothing'}); pass ema=False.")
        weights = found["model_ema"]
    else:
        weights = found.get("model", found.get("state_dict", found))
    if not isinstance(weights, dict) or not weights or not all(hasattr(a, "detach") for a in weights.values()):
        raise InputError(
            f"{path} holds no weights: it needs tensors by name in a 'model' or 'state_dict' entry, found "
            f"{held or 'nothing'}."
        )
    return weights
