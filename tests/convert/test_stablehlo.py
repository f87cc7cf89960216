"""Exported models: the same logits from the file, at any batch size, with every token reduction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from small_models import random_model

from top_jax.convert.stablehlo import PLATFORMS, check_module, export_model, largest_difference, write_module
from top_jax.errors import InputError
from top_jax.models import abstract_model
from top_jax.pruning import Evit, Merging, Pruning

SIDE, CLASSES = 16, 5
SCAN = {"d_state": 4, "implementation": "xla"}
TWICE = {"after_blocks": (1, 2), "keep_ratio": 0.7}


def build(name="vim_tiny", pruning=None, **sizes):
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": CLASSES, **sizes}
    return random_model(name, scale=0.3, pruning=pruning, **sizes)


def draw(count):
    return np.random.default_rng(0).normal(size=(count, SIDE, SIDE, 3)).astype(np.float32)


def reread(exported):
    return export.deserialize(exported.serialize())


@pytest.fixture(scope="module")
def pruned():
    return build(pruning=Pruning(after_blocks=(1,), keep_ratio=0.5), **SCAN)


@pytest.fixture(scope="module")
def exported(pruned):
    """The model for any batch size on cpu and cuda, read back from its bytes."""
    return reread(export_model(pruned))


def test_the_logits_of_a_file(pruned, exported):
    assert exported.platforms == ("cpu", "cuda")
    assert [str(size) for size in exported.in_avals[0].shape] == ["b", "16", "16", "3"]
    logits = jax.jit(exported.call)(draw(3))
    assert logits.dtype == jnp.float32
    expected = jax.jit(lambda model, images: model(images))(pruned, draw(3))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_the_difference_is_seen(pruned, exported):
    """None between a model and its file, a large one between other weights and that file."""
    (same,) = largest_difference(pruned, exported, draw(1))
    assert (same.platform, same.batch_size) == ("cpu", 1)
    assert same.max_abs <= 1e-6 and same.max_rel <= 1e-5
    graphdef, state = nnx.split(pruned)
    other = nnx.merge(graphdef, state)
    other.head.bias[...] = jnp.asarray(np.asarray(other.head.bias) + np.float32(0.5) * (np.arange(CLASSES) == 1))
    (one,) = largest_difference(other, exported, draw(1))
    assert one.max_abs == pytest.approx(0.5, abs=1e-5) and one.max_rel > 1e-2


@pytest.fixture(scope="module")
def of_pixels():
    """A dense model in train mode, its normalisation of pixels, and its export for one batch size and platform."""
    model = build(drop_path=0.9, **SCAN)
    model.train()
    halve = lambda pixels: pixels.astype(jnp.float32) / 128 - 1  # noqa: E731
    return model, halve, reread(export_model(model, batch_size=2, platforms=("cpu",), normalize=halve))


def test_pixels_in_batches_of_one_size(of_pixels):
    """Drop-path is off in the file, while the model itself stays in train mode."""
    model, halve, exported = of_pixels
    assert exported.in_avals[0].shape == (2, SIDE, SIDE, 3) and exported.in_avals[0].dtype == jnp.uint8
    assert not model.blocks[1].drop_path.deterministic
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    (parity,) = largest_difference(model, exported, pixels, normalize=halve)
    assert parity.batch_size == 2 and parity.max_rel <= 1e-5
    with pytest.raises(ValueError, match=r"uint8\[2,16,16,3\]|size|shape"):
        exported.call(pixels[:1])


def test_the_bare_module(of_pixels, tmp_path):
    """Text and bytecode are the same module, from pixels to logits, without custom calls."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo

    _, _, exported = of_pixels
    for suffix in (".mlir", ".mlirbc"):
        write_module(exported, tmp_path / f"a{suffix}")
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        portable = str(stablehlo.deserialize_portable_artifact(context, (tmp_path / "a.mlirbc").read_bytes()))
        text = str(ir.Module.parse((tmp_path / "a.mlir").read_text()))  # the line above loads the func dialect
    assert text == portable and "custom_call" not in text
    assert "@main(%arg0: tensor<2x16x16x3xui8>) -> (tensor<2x5xf32>" in text
    assert {path.name for path in tmp_path.iterdir()} == {"a.mlir", "a.mlirbc"}


def test_refuses(pruned, exported, tmp_path):
    with pytest.raises(InputError, match="batch_size=0"):
        export_model(pruned, batch_size=0)
    for platforms in ((), ("cpu", "cpu"), ("gpu",)):
        with pytest.raises(InputError, match=f"platforms={','.join(platforms)};.* {', '.join(PLATFORMS)}"):
            export_model(pruned, platforms=platforms)
    with pytest.raises(InputError, match="implementation='auto'.* implementation='xla'"):
        export_model(abstract_model("vim_tiny", depth=1))  # needs no weights to be refused
    with pytest.raises(InputError, match="'.txt'.* .mlir, .mlirbc"):
        check_module("a.txt", ("cpu",), 1)
    with pytest.raises(InputError, match="2 platforms and batch size b"):
        write_module(exported, tmp_path / "a.mlir")
    assert not list(tmp_path.iterdir())


REDUCED = {
    **{f"vim {name}": ("vim_tiny", Pruning(alignment=name, **TWICE), SCAN) for name in ("none", "decay")},
    "vim score": ("vim_tiny", Pruning(alignment="none", order="score", **TWICE), SCAN),
    "vim random": ("vim_tiny", Pruning(score="random", **TWICE), SCAN),
    "vim merged": ("vim_tiny", Merging(alignment="decay", **TWICE), SCAN),
    **{
        f"plain_mamba {name}": ("plain_mamba_l1", Pruning(alignment=name, **TWICE), SCAN)
        for name in ("none", "hold", "decay")
    },
    "deit evit": ("deit_tiny", Evit(**TWICE), {"num_heads": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REDUCED)
def test_every_reduction_at_any_batch_size(case):
    name, reduction, sizes = REDUCED[case]
    model = build(name, reduction, depth=3, **sizes)
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    logits = quick(reread(export_model(model)).call)(draw(3))
    expected = quick(lambda model, images: model(images))(model, draw(3))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
