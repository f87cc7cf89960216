"""Models as files that need none of our code: StableHLO with the weights in it, through `jax.export`.

    with open("vim_s.stablehlo", "rb") as file:
        classify = jax.export.deserialize(file.read()).call
    logits = classify(images)

is all that a reader needs, with JAX alone; docs/export.md says what others do with the StableHLO.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from top_jax.convert.files import new_file
from top_jax.errors import InputError
from top_jax.models import Backbone
from top_jax.models.weights import weights_of

PLATFORMS: Final = ("cpu", "cuda", "rocm", "tpu")  # those of JAX
IMPLEMENTATION: Final = "xla"  # of the scan: the one that is StableHLO alone
MODULE_FORMATS: Final = (".mlir", ".mlirbc")

Normalize = Callable[[Any], jax.Array]
"""Pixels uint8 `[B, H, W, 3]` to the model's input, float32 of the same shape."""


class Parity(NamedTuple):
    """How far an exported model is from its original.

    Attributes:
        platform: where both ran.
        batch_size: images in the exported model's call.
        max_abs: largest difference of two logits.
        max_rel: the same as a share of the largest logit.
    """

    platform: str
    batch_size: int
    max_abs: float
    max_rel: float


def export_model(
    model: Backbone,
    *,
    batch_size: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    normalize: Normalize | None = None,
) -> export.Exported:
    """The model in eval mode, with its weights and its reduction of tokens, as one function of a batch of images.

    It is lowered for every platform on this machine, whatever devices that has. The precision of its matrix products
    is that of `jax.default_matmul_precision` now.

    Args:
        model: with weights. Its scans must be those of `implementation="xla"`: the kernels would be custom calls,
            for which neither Pallas nor Triton promises that a later release can read them.
        batch_size: images per call; None for any number (the symbolic dimension `b`).
        platforms: where it is to run, of `PLATFORMS`.
        normalize: what is to become part of it, so that it takes uint8 pixels.

    Returns:
        float32 `[B, H, W, 3]`, normalised (with `normalize`: uint8), to float32 logits `[B, num_classes]`.

    Raises:
        InputError: a batch size or a platform that cannot be, or scans that cannot be exported.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}; needed: at least 1 image, or None for any number of them.")
    if not platforms or len(set(platforms)) < len(platforms) or not set(platforms) <= set(PLATFORMS):
        raise InputError(f"platforms={','.join(platforms)}; needed: one or more of {', '.join(PLATFORMS)}, each once.")
    if model.scan_implementation is not None and model.config.implementation != IMPLEMENTATION:
        raise InputError(
            f"the model has implementation={model.config.implementation!r}; an exported file needs "
            f"implementation={IMPLEMENTATION!r}, the one without custom calls: build the model with it."
        )
    graphdef, weights = nnx.graphdef(model), weights_of(model)
    classify = jax.jit(lambda images: _classify(graphdef, weights, images, normalize))
    height, width = model.config.img_size
    batch = "b" if batch_size is None else str(batch_size)
    shape = export.symbolic_shape(f"{batch}, {height}, {width}, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.float32 if normalize is None else jnp.uint8)
    return export.export(classify, platforms=platforms)(images)


def largest_difference(
    model: Backbone, exported: export.Exported, images: np.ndarray, *, normalize: Normalize | None = None
) -> list[Parity]:
    """Compares an exported model's logits with those of the model itself, on every platform that is there.

    Args:
        model: what was exported.
        exported: as it was read from its file.
        images: what it takes, at least as many as it takes in one call. One of any batch size is called with a
            single image and with all of them.
        normalize: as in `export_model`.

    Returns:
        For each platform of the exported model of which this machine has a device, and for each batch size.
    """
    size = exported.in_avals[0].shape[0]
    batch_sizes = (size,) if isinstance(size, int) else sorted({1, len(images)})
    graphdef = nnx.graphdef(model)
    original = jax.jit(lambda weights, images: _classify(graphdef, weights, images, normalize))
    result = []
    for platform, device in _devices(exported.platforms):
        weights, inputs = jax.device_put((weights_of(model), images), device)
        expected = np.asarray(original(weights, inputs))
        for batch_size in batch_sizes:
            logits = np.asarray(jax.jit(exported.call)(inputs[:batch_size]))
            difference = float(np.max(np.abs(logits - expected[:batch_size])))
            result.append(
                Parity(platform, batch_size, difference, difference / float(np.max(np.abs(expected[:batch_size]))))
            )
    return result


def write_module(exported: export.Exported, path: str | Path) -> None:
    """Writes the bare StableHLO, for tools other than JAX: `main` from images to logits.

    Args:
        exported: for one platform and one batch size.
        path: `.mlir` for text, `.mlirbc` for StableHLO's portable bytecode.

    Raises:
        InputError: another suffix, several platforms, any batch size, or a place that cannot be written.
    """
    check_module(path, exported.platforms, exported.in_avals[0].shape[0])
    text = Path(path).suffix == ".mlir"
    content = str(exported.mlir_module()).encode() if text else bytes(exported.mlir_module_serialized)
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def check_module(path: str | Path, platforms: Sequence[str], batch_size: Any) -> None:
    """Raises InputError where `write_module` could not write such a module there."""
    if Path(path).suffix not in MODULE_FORMATS:
        raise InputError(
            f"{path} has the suffix {Path(path).suffix!r}; the bare StableHLO needs one of {', '.join(MODULE_FORMATS)}."
        )
    if len(platforms) != 1 or not isinstance(batch_size, int):
        raise InputError(
            f"the bare StableHLO came with {len(platforms)} platforms and batch size "
            f"{batch_size if isinstance(batch_size, int) else 'b'}; needed: one platform and a number of images, for "
            "only JAX knows how to choose between several (such as --platforms=cpu --batch=1)."
        )


def _classify(graphdef: Any, weights: Any, images: Any, normalize: Normalize | None) -> jax.Array:
    model = nnx.merge(graphdef, weights)
    model.eval()
    return model(images if normalize is None else normalize(images))


def _devices(platforms: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Those of the platforms of which this machine has a device, with the first of each."""
    for platform in platforms:
        with contextlib.suppress(RuntimeError):  # JAX's word for none
            yield platform, jax.devices(platform)[0]
