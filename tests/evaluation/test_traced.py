"""The `executed` count against the multiplications in the traced model; nothing is compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from top_jax.evaluation.flops import count_macs
from top_jax.evaluation.flops.of_config import check_executed, trace_model
from top_jax.evaluation.flops.traced import count_multiplications
from top_jax.models import PlainMambaConfig, VimConfig, model_config
from top_jax.models.depthwise_conv import depthwise_conv2d
from top_jax.models.layers import causal_conv1d
from top_jax.pruning import Evit, Merging, Pruning

OWN = {"vim_tiny": {"d_state": 4}, "plain_mamba_l1": {"d_state": 4, "layers_with_dwconv": (0,)}, "deit_tiny": {}}
ONCE = {"after_blocks": (1,), "keep_ratio": 0.6}
VIM, PLAIN, DEIT = OWN


def config_of(name, depth=2, **overrides):
    """Returns the smallest sizes that have every part: 3 x 4 patches."""
    heads = {"num_heads": 2} if name == DEIT else {}
    sizes = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 16, "depth": depth, "num_classes": 5}
    return model_config(name, **{**sizes, **OWN[name], **heads, **overrides})


@functools.cache
def traced(config, pruning):
    return trace_model(config, pruning)


CASES = [
    (config_of(VIM, depth=1), None),
    (config_of(VIM), Merging(**ONCE)),
    (config_of(VIM, dtype="bfloat16"), Pruning(**ONCE, alignment="decay", score="random")),
    (config_of(PLAIN, depth=1), None),
    (config_of(PLAIN, img_size=(23, 33), stride=6, remat=True), Pruning(**ONCE)),
    (config_of(PLAIN, reorder_parameters=True), Pruning(**ONCE, alignment="none")),
    (config_of(PLAIN), Evit(**ONCE, score="clip")),
    (config_of(DEIT), None),
    (config_of(DEIT), Evit(**ONCE)),
    (config_of(DEIT), Merging(**ONCE, alignment="none")),
]


@pytest.mark.parametrize(("config", "pruning"), CASES)
def test_the_jaxpr_agrees(config, pruning):
    """Both agree to the last multiplication, also on a GPU, where the depthwise convolution is another operation."""
    model, cost = traced(config, pruning), count_macs(config, pruning)
    for platform in ("cpu", "gpu"):
        counted, without_scans, scans = check_executed(model._replace(platform=platform), cost)
        assert (without_scans, scans) == (0, 0)
        scan = cost.parts("executed").get("scan", 0)  # 9 operations, of which 4 are multiplications
        assert sum(counted) == cost.macs["executed"] - scan + scan * 4 // 9
        shifted = isinstance(config, VimConfig) or (isinstance(config, PlainMambaConfig) and platform == "cpu")
        assert (counted.taps > 0) == shifted


def test_a_wrong_count_is_found_out():
    """Compares the traced model with the counts of other reductions."""
    config, merging = CASES[1]
    model = traced(config, merging)
    _, without_scans, scans = check_executed(model, count_macs(config, Pruning(**ONCE)))
    assert (without_scans, scans) == (count_macs(config, merging).parts("executed")["merging"], 0)
    _, without_scans, scans = check_executed(model, count_macs(config))
    assert without_scans < 0 and scans < 0


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def looped(x, w):
    """Computes one product and a loop of five with two more, inside a loop of three."""

    def step(h, _):
        return (h @ w) @ w * x, None

    def three(h, _):
        return lax.scan(step, h @ w, None, length=5)[0], None

    return lax.scan(three, x, None, length=3)[0]


@pytest.mark.parametrize(
    ("function", "shapes", "products", "taps", "loops"),
    [
        (lambda x, w: jnp.sum(x @ w), [(2, 3), (3, 4)], 24, 0, 0),
        (lambda x, w: (x @ w, x @ w)[0], [(2, 3), (3, 4)], 24, 0, 0),  # unused results are not computed
        (jax.checkpoint(lambda x, w: jnp.einsum("bij,bkj->bik", x, w)), [(2, 3, 5), (2, 4, 5)], 120, 0, 0),
        (looped, [(2, 2), (2, 2)], 3 * 8, 0, 15 * (2 * 8 + 4)),
        (lambda x, w, b: causal_conv1d(x, w, b, reverse=True), [(1, 6, 3), (4, 3), (3,)], 0, 72, 0),
        (depthwise_conv2d, [(1, 5, 6, 2), (3, 3, 2)], 0, 5 * 6 * 9 * 2, 0),
        (lambda x: jnp.pad(x, 1) * 3.0 + x[:1, :1] * x[0, 0], [(4, 4)], 0, 0, 0),  # no window of a padded array
    ],
)
def test_multiplications(function, shapes, products, taps, loops):
    program = jax.jit(function).trace(*(shape(*sizes) for sizes in shapes))
    assert count_multiplications(program.jaxpr, "cpu") == (products, taps, loops)


def test_a_convolution_of_groups():
    convolve = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 1), [(3, 2), (0, 4)], dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    program = jax.jit(convolve).trace(shape(1, 9, 8, 4), shape(5, 3, 2, 6))
    rows, columns = (9 + 5 - 5) // 2 + 1, 8 + 4 - 3 + 1
    assert count_multiplications(program.jaxpr, "cpu").products == rows * columns * 6 * 5 * 3 * 2
