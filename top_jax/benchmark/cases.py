"""The scans inside the published models, dense and after each prune, as arguments of `directional_scan`.

ViM scans one direction at a time, each with its own u, delta, B and C; XLA computes the sum and the gate. PlainMamba's
four directions share u, which they visit in boustrophedon orders, and delta, B and C, which stay in raster order. Only
the direction vector in B differs (docs/concepts/models.md, section 2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from top_jax.models.traversals import traverse
from top_jax.pruning import Pruning

Arrays = dict[str, jax.Array]

GRID: Final = 14  # rows and columns of patches of a 224-pixel image
BATCH: Final = 128


@dataclasses.dataclass(frozen=True)
class ScanCase:
    """Sizes and options of one scan.

    Attributes:
        name: the model, or what the case tests.
        length: L.
        width: E.
        states: N.
        directions: 1, 2 as in ViM, or 4 as in PlainMamba, which visits the tokens of a square grid by an order.
        dtype: dtype of u, delta, B, C and z.
        batch: B.
        decay: whether the tokens have gaps through which the state decays, as after pruning.
        gated: whether z gates the sum over directions.
        backwards: whether a single direction scans from the last token to the first.
        reorder_parameters: see `directional_scan`.
        score: see `directional_scan`.
    """

    name: str
    length: int
    width: int
    states: int = 16
    directions: int = 2
    dtype: str = "bfloat16"
    batch: int = BATCH
    decay: bool = False
    gated: bool = True
    backwards: bool = False
    reorder_parameters: bool = False
    score: str | None = None

    @property
    def ordered(self) -> bool:
        """Whether tokens are visited by an order."""
        return self.directions == 4

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `directional_scan` other than the arrays."""
        reverse = (self.backwards,) if self.directions == 1 else (False, True)[: self.directions]
        return {
            "reverse": (False,) * 4 if self.ordered else reverse,
            "reorder_parameters": self.reorder_parameters,
            "alignment": "decay" if self.decay else "none",
            "score": self.score,
        }

    def label(self) -> str:
        """Returns the case's name in a table."""
        return f"{self.name} L{self.length} {self.dtype}{' decay' if self.decay else ''}"


@dataclasses.dataclass(frozen=True)
class ScannedModel:
    """Sizes of a published model that its scans depend on.

    Attributes:
        name: as in the tables.
        width: E.
        directions: directions of one call, as in `ScanCase`.
        tokens: L of the dense model.
        pruning: the schedule that the configs use.
        depth: number of blocks.
    """

    name: str
    width: int
    directions: int
    tokens: int
    pruning: Pruning
    depth: int = 24

    def pruned_lengths(self) -> tuple[int, ...]:
        """Returns L after each pruning step."""
        extra = self.tokens - GRID**2  # the class token
        return tuple(cut.after + extra for cut in self.pruning.schedule(GRID**2, self.depth))


VIM_SMALL: Final = ScannedModel("ViM-S", 768, 1, 197, Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8))
MODELS: Final = (
    VIM_SMALL,
    ScannedModel("ViM-T", 384, 1, 197, Pruning(after_blocks=(10, 20), keep_ratio=0.85)),
    ScannedModel("ViM-B", 1536, 1, 197, Pruning(after_blocks=(5, 10, 15), keep_ratio=0.8)),
    ScannedModel("PlainMamba-L1", 384, 4, 196, Pruning(after_blocks=(5, 10, 15), keep_ratio=0.7)),
    ScannedModel("PlainMamba-L3", 896, 4, 196, Pruning(after_blocks=(6, 12, 18), keep_ratio=0.7), depth=36),
)


def model_case(model: ScannedModel, dtype: str, *, length: int | None = None, decay: bool = False) -> ScanCase:
    """Returns a model's scan, at its dense length unless another is given."""
    return ScanCase(
        model.name,
        length or model.tokens,
        model.width,
        directions=model.directions,
        dtype=dtype,
        decay=decay,
        gated=model.directions > 1,
    )


def both_directions(model: ScannedModel, dtype: str) -> ScanCase:
    """Returns a ViM's two directions in one gated call; its mixer would use this if it were faster."""
    return ScanCase(f"{model.name}, both directions", model.tokens, model.width, dtype=dtype)


def make_arrays(case: ScanCase, seed: int) -> Arrays:
    """Draws arguments of `directional_scan` by name: never 0, with time steps and decays as in a trained model."""
    keys = jax.random.split(jax.random.key(seed), 9)
    directions, tokens = case.directions, (case.batch, case.length, case.width)
    each = 1 if case.ordered else directions
    selective = (case.batch, case.length, case.states)

    def draw(key: jax.Array, *shape: int, dtype: str = case.dtype) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    arrays = {
        "u": draw(keys[0], each, *tokens),
        "delta": draw(keys[1], each, *tokens),
        "A": -jnp.exp(draw(keys[2], each, case.width, case.states, dtype="float32")),
        "B": draw(keys[3], directions, *selective),
        "C": draw(keys[4], each, *selective),
        "D": draw(keys[5], each, case.width, dtype="float32"),
        "delta_bias": draw(keys[6], each, case.width, dtype="float32") - 2,
    }
    if case.gated:
        arrays["z"] = draw(keys[7], *tokens)
    return arrays | _places(case, seed)


def make_cotangent(case: ScanCase, seed: int) -> jax.Array:
    """Draws a cotangent of y, `[B, L, E]`."""
    shape = (case.batch, case.length, case.width)
    return jax.random.normal(jax.random.key(seed + 1000), shape, jnp.float32).astype(case.dtype)


def _places(case: ScanCase, seed: int) -> Arrays:
    """Draws `order` where the case has one, and `positions` where the state decays through gaps."""
    rng = np.random.default_rng(seed)
    if not case.ordered:
        if not case.decay:
            return {}
        steps = rng.integers(1, 4, size=(1, case.batch, case.length))
        return {"positions": jnp.asarray(np.cumsum(steps, axis=-1) - 1, jnp.int32)}
    side = max(GRID, int(np.ceil(np.sqrt(case.length))))
    kept = np.stack([np.sort(rng.choice(side * side, case.length, replace=False)) for _ in range(case.batch)])
    alignment = "decay" if case.decay else "hold"
    paths = traverse(jnp.asarray(kept, jnp.int32), (side, side), alignment, by_token=False)
    return {"order": paths.order} if paths.positions is None else {"order": paths.order, "positions": paths.positions}
