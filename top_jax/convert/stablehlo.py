"""Exports models as StableHLO with the weights inside, through `jax.export`: files that run without this package.

Reading one needs JAX alone; docs/guides/export.md describes other readers.

    with open("vim_s.stablehlo", "rb") as file:
        classify = jax.export.deserialize(file.read()).call
    logits = classify(images)
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

from top_jax.errors import InputError
from top_jax.files import requested_file
from top_jax.models import Backbone, Segmenter
from top_jax.models.weights import weights_of

PLATFORMS: Final = ("cpu", "cuda", "rocm", "tpu")  # the platforms of JAX
IMPLEMENTATION: Final = "xla"  # the only implementation of the scan without custom calls
MODULE_FORMATS: Final = (".mlir", ".mlirbc")

Normalize = Callable[[Any], jax.Array]
"""Converts pixels, uint8 `[B, H, W, 3]`, to the model's input, float32 of the same shape."""


class Parity(NamedTuple):
    """Difference between an exported model and its original.

    Attributes:
        platform: the platform that both ran on.
        batch_size: images in one call of the exported model.
        max_abs: largest absolute difference of two logits.
        max_rel: the same, divided by the largest absolute logit.
    """

    platform: str
    batch_size: int
    max_abs: float
    max_rel: float


def export_model(
    model: Backbone | Segmenter,
    *,
    batch_size: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    normalize: Normalize | None = None,
) -> export.Exported:
    """Exports a model in eval mode, with its weights and its token reduction, as one function of a batch of images.

    Lowering needs no device of the target platforms. Matrix products have the precision that
    `jax.default_matmul_precision` sets at the time of this call.

    Args:
        model: with weights. A model with scans must have `implementation="xla"`: the GPU kernels would be custom
            calls, which neither Pallas nor Triton promises to keep readable for later releases.
        batch_size: images per call; None allows any number (the symbolic dimension `b`).
        platforms: the platforms to lower for, from `PLATFORMS`.
        normalize: include the normalisation in the exported function, which then takes uint8 pixels.

    Returns:
        The function: images float32 `[B, H, W, 3]`, normalised (with `normalize`: uint8), to logits float32
        `[B, num_classes]`; a segmenter's are `[B, H, W, num_classes]`. H and W are the model's `img_size`.

    Raises:
        InputError: the batch size or a platform is impossible, or the scans cannot be exported.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}; needed: at least 1 image, or None for any number.")
    check_platforms(platforms)
    sizes = model.backbone.config if isinstance(model, Segmenter) else model.config
    if model.scan_implementation is not None and sizes.implementation != IMPLEMENTATION:
        raise InputError(
            f"the model has implementation={sizes.implementation!r}; exporting needs "
            f"implementation={IMPLEMENTATION!r}, the only one without custom calls: build the model with it."
        )
    graphdef, weights = nnx.graphdef(model), weights_of(model)
    classify = jax.jit(lambda images: _classify(graphdef, weights, images, normalize))
    height, width = sizes.img_size
    batch = "b" if batch_size is None else str(batch_size)
    shape = export.symbolic_shape(f"{batch}, {height}, {width}, 3")
    images = jax.ShapeDtypeStruct(shape, jnp.float32 if normalize is None else jnp.uint8)
    return export.export(classify, platforms=platforms)(images)


def largest_difference(
    model: Backbone | Segmenter, exported: export.Exported, images: np.ndarray, *, normalize: Normalize | None = None
) -> list[Parity]:
    """Compares the logits of an exported model with those of the model itself, on every platform of this machine.

    Args:
        model: the original.
        exported: the exported model, as read from its file.
        images: its input, at least as many images as one call takes. An exported model of any batch size is called
            with one image and with all images.
        normalize: as in `export_model`.

    Returns:
        One entry for each batch size, on each platform of the exported model for which this machine has a device.
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
    """Writes the bare StableHLO module, for tools other than JAX: one function, `main`, from images to logits.

    Args:
        exported: an exported model for one platform and one batch size.
        path: the file: `.mlir` for text, `.mlirbc` for StableHLO's portable bytecode.

    Raises:
        InputError: the suffix is another, there are several platforms or batch sizes, or the file cannot be written.
    """
    check_module(path, exported.platforms, exported.in_avals[0].shape[0])
    text = Path(path).suffix == ".mlir"
    content = str(exported.mlir_module()).encode() if text else bytes(exported.mlir_module_serialized)
    with requested_file(path) as temporary:
        temporary.write_bytes(content)


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises InputError unless these are platforms of `PLATFORMS`, each once."""
    if not platforms or len(set(platforms)) < len(platforms) or not set(platforms) <= set(PLATFORMS):
        raise InputError(f"platforms={','.join(platforms)}; needed: one or more of {', '.join(PLATFORMS)}, each once.")


def check_module(path: str | Path, platforms: Sequence[str], batch_size: Any) -> None:
    """Raises InputError if `write_module` cannot write a module for these platforms and batch size to `path`."""
    if Path(path).suffix not in MODULE_FORMATS:
        raise InputError(
            f"{path} has the suffix {Path(path).suffix!r}; the bare StableHLO needs one of {', '.join(MODULE_FORMATS)}."
        )
    if len(platforms) != 1 or not isinstance(batch_size, int):
        raise InputError(
            f"the bare StableHLO was requested for {len(platforms)} platforms and batch size "
            f"{batch_size if isinstance(batch_size, int) else 'b'}; needed: one platform and a number of images, such "
            "as --platforms=cpu --batch=1 (only JAX can choose between several)."
        )


def _classify(graphdef: Any, weights: Any, images: Any, normalize: Normalize | None) -> jax.Array:
    model = nnx.merge(graphdef, weights)
    model.eval()
    return model(images if normalize is None else normalize(images))


def _devices(platforms: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields the platforms that this machine can run, with one device each."""
    for platform in platforms:
        with contextlib.suppress(RuntimeError):  # JAX raises it if there is no such device
            yield platform, jax.devices(platform)[0]
