"""Compiled programs outlive the process."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR already says where it is.

    It lies in $XDG_CACHE_HOME/top_jax (by default ~/.cache/top_jax) and holds what took over a second to compile.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "top_jax" / "xla"))
