"""Our rules for XLA's cost analysis against XLA itself; nothing is compiled."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tools import xla_flops
from tools.xla_flops import check_xla, expected_flops
from top_jax.evaluation.flops.of_config import trace_model
from top_jax.models import model_config
from top_jax.pruning import Evit, Merging, Pruning

ONCE = {"after_blocks": (1,), "keep_ratio": 0.6}
TINY = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}
PLAIN = {**TINY, "d_state": 4, "layers_with_dwconv": (0,), "img_size": (23, 33), "stride": 6, "remat": True}
CASES = [
    (model_config("vim_tiny", **TINY, d_state=4), Merging(**ONCE)),
    (model_config("plain_mamba_l1", **PLAIN), Pruning(**ONCE)),
    (model_config("deit_tiny", **TINY, num_heads=2), Evit(**ONCE)),
]


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def costs_of(program):
    costs = program.lower().cost_analysis()
    assert costs is not None
    return costs


@pytest.mark.parametrize(("config", "pruning"), CASES)
def test_xla_is_explained(config, pruning):
    found = check_xla(trace_model(config, pruning))
    assert found is not None and found.compiled_flops is None
    assert found.flops > next(iter(found.steps.values())) / 2
    assert abs(found.unexplained) < 2e-3 * found.flops  # 1e-5 of a model that is not as tiny
    assert found.transcendentals == found.expected_transcendentals > 0


def test_the_command(root, tmp_path, monkeypatch, capsys):
    config, out = root / "tests" / "tiny_run.py", tmp_path / "xla.json"
    monkeypatch.setattr(sys, "argv", ["xla_flops", f"--config={config}", "--dtype=float32", f"--out={out}"])
    xla_flops.main()
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert written["flops"] == sum(written["steps"].values()) + written["unexplained"]
    assert f"{written['flops']:,}" in printed and all(name in printed for name in written["steps"])


def test_a_convolution_of_groups():
    convolve = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 1), [(3, 2), (0, 4)], dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    program = jax.jit(convolve).trace(shape(1, 9, 8, 4), shape(5, 3, 2, 6))
    expected = expected_flops(program.jaxpr, "cpu")
    assert expected.total == costs_of(program)["flops"] and expected.border > 0


@pytest.mark.parametrize(
    ("function", "shapes", "transcendentals"),
    [
        (jax.nn.silu, [(9, 5)], 45),
        (lambda x: jax.nn.softplus(x) + 0.0, [(9, 5)], 90),
        (lambda x: jax.nn.gelu(x, approximate=False), [(9, 5)], 45),
        (lambda x: jnp.sort(x, axis=1) - jnp.cumsum(x, axis=1), [(9, 5)], 0),
        (lambda x: jnp.take_along_axis(x, (x[:, ::-1] > 0).astype(jnp.int32), axis=1), [(9, 5)], 0),
        (lambda x: jnp.max(jnp.where(x > 0, x, -x), axis=0), [(9, 5)], 0),
        (lambda x: x.astype(jnp.bfloat16) @ jnp.ones((5, 2), jnp.bfloat16), [(9, 5)], 0),
    ],
)
def test_the_rules_of_xla(function, shapes, transcendentals):
    """Each against XLA itself."""
    program = jax.jit(function).trace(*(shape(*sizes) for sizes in shapes))
    costs, expected = costs_of(program), expected_flops(program.jaxpr, "cpu")
    assert expected.total == costs["flops"]
    assert expected.transcendentals == costs.get("transcendentals", 0) == transcendentals
