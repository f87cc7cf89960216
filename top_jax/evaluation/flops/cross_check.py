"""The `executed` count against two others: of the traced model's jaxpr, and XLA's cost analysis.

The jaxpr's has to agree to the last multiplication. XLA counts something else; what lies between is put together from
the jaxpr by XLA's rules (`xla_flops.py`), and what that does not explain is given too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.evaluation.flops.count import Cost
from top_jax.evaluation.flops.parts import SCAN_MULTIPLICATIONS, SCAN_OPERATIONS
from top_jax.evaluation.flops.traced import Multiplications, count_multiplications
from top_jax.evaluation.flops.xla_flops import expected_flops
from top_jax.models import Backbone, BackboneConfig
from top_jax.models.registry import BACKBONES
from top_jax.models.sizes import MambaConfig
from top_jax.models.weights import parameter_count
from top_jax.pruning import Reduction


class TracedModel(NamedTuple):
    """A model's forward pass of one image, traced; its scans by plain XLA operations, whatever the config says.

    Attributes:
        traced: `jax.stages.Traced`.
        parameters: how many numbers it learns.
        platform: for which it is lowered: JAX's default.
    """

    traced: Any
    parameters: int
    platform: str


@dataclasses.dataclass(frozen=True)
class XlaCheck:
    """XLA's operations of one image, beside the `executed` multiply-accumulates.

    Attributes:
        flops: XLA's, of the program before it is optimised.
        transcendentals: XLA's, which it counts apart.
        steps: from the jaxpr's multiply-accumulates to XLA's operations; they sum up to what is expected of XLA.
        expected_transcendentals: of the jaxpr.
        compiled_flops: XLA's, of the optimised program, or None where it was not compiled.
    """

    flops: int
    transcendentals: int
    steps: dict[str, int]
    expected_transcendentals: int
    compiled_flops: int | None

    @property
    def unexplained(self) -> int:
        """What XLA counts beside the steps."""
        return self.flops - sum(self.steps.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what is not explained."""
        return {**dataclasses.asdict(self), "unexplained": self.unexplained}


def trace_model(config: BackboneConfig, pruning: Reduction | None) -> TracedModel:
    """Traces the classifier without making its weights.

    Raises:
        InputError: a reduction that the model cannot have.
    """
    if isinstance(config, MambaConfig):
        config = dataclasses.replace(config, implementation="xla")
    model: Backbone = nnx.eval_shape(lambda: BACKBONES[type(config)](config, pruning, rngs=nnx.Rngs(0)))
    model.eval()
    image = jax.ShapeDtypeStruct((1, *config.img_size, 3), jnp.float32)
    traced = jax.jit(lambda model, image: model(image)).trace(model, image)
    return TracedModel(traced, parameter_count(model), jax.default_backend())


def check_executed(model: TracedModel, cost: Cost) -> tuple[Multiplications, int, int]:
    """The jaxpr's own count, and by how much it is above `cost`: without the scans, and the scans' multiplications."""
    counted, parts = count_multiplications(model.traced.jaxpr, model.platform), cost.parts("executed")
    scan = parts.get("scan", 0)
    multiplications = scan // SCAN_OPERATIONS * SCAN_MULTIPLICATIONS
    return counted, counted.products + counted.taps - (sum(parts.values()) - scan), counted.loops - multiplications


def check_xla(model: TracedModel, *, compile: bool = False) -> XlaCheck | None:
    """XLA's cost analysis, explained; None where the backend gives none.

    Args:
        model: traced.
        compile: compile the program, which takes its time, to have the optimised one's count too.
    """
    lowered = model.traced.lower()
    told = _flops(lowered)
    if told is None:
        return None
    flops, transcendentals = told
    counted = count_multiplications(model.traced.jaxpr, model.platform)
    expected = expected_flops(model.traced.jaxpr, model.platform)
    steps = {
        "multiply_accumulates": 2 * sum(counted),
        "border_taps": -expected.border,
        "loop_trips": expected.loops - 2 * counted.loops,
        "elementwise": expected.elementwise - 2 * counted.taps,
        "sums_and_sorts": expected.gathering,
    }
    compiled = _flops(lowered.compile()) if compile else None
    return XlaCheck(flops, transcendentals, steps, expected.transcendentals, None if compiled is None else compiled[0])


def _flops(program: Any) -> tuple[int, int] | None:
    """XLA's flops and transcendentals of a lowered or compiled program."""
    costs: dict[str, float] | None = program.cost_analysis()
    return (int(costs["flops"]), int(costs.get("transcendentals", 0))) if costs and "flops" in costs else None
