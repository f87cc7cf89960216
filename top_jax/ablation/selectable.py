"""One compiled program for all scores: compiling is most of the time that an ablation of a small model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from top_jax.config import DataConfig
from top_jax.data import normalize
from top_jax.models.weights import Weights
from top_jax.pruning import Evidence, Pruning, Tokens
from top_jax.pruning.score import token_scores
from top_jax.typing import Array, Float, Int, Slots, SlotScores


class Choice(NamedTuple):
    """Of a setting, what a program takes as an argument.

    Attributes:
        ranking: int32, which of the program's rankings.
        best_first: bool, order="score".
    """

    ranking: Any
    best_first: Any


class Outcome(NamedTuple):
    """Of each image of a batch, whether the class of largest logit (the first of equals) is right, and the loss."""

    correct: Int[Array, " B"]
    loss: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selectable(Pruning):
    """`Pruning` whose score and order are chosen when it runs.

    Attributes:
        rankings: (score, seed) of each that there is.
        choice: of one, as traced arrays.
    """

    rankings: tuple[tuple[str, int], ...]
    choice: Choice

    def scores(self, tokens: Tokens, evidence: Evidence, *, block: int, keep: int) -> SlotScores:
        """Those of the chosen ranking; all are computed."""
        slots = tokens.patch_slots()
        of_each = [
            token_scores(score, evidence, tokens.positions, slots, keep=keep, seed=seed, block=block)
            for score, seed in self.rankings
        ]
        return jnp.take(jnp.stack(of_each), self.choice.ranking, axis=0)

    def arranged(self, best: Slots) -> Slots:
        """As the choice says."""
        return jnp.where(self.choice.best_first, best, jnp.sort(best, axis=1))


class Program:
    """Classifies batches under any of some settings that differ in score, order and seed alone.

    Args:
        graphdef: of the model, pruned by any of them.
        settings: at least one.
        data: how pixels are normalised.
    """

    def __init__(self, graphdef: nnx.GraphDef[Any], settings: Sequence[Pruning], data: DataConfig):
        self._rankings = tuple(dict.fromkeys((setting.score, setting.seed) for setting in settings))
        self._step = _make_step(graphdef, settings[0], self._rankings, data)

    def __call__(self, setting: Pruning, weights: Weights, batch: dict[str, jax.Array]) -> Outcome:
        """Of one batch; compiles at the first."""
        ranking = self._rankings.index((setting.score, setting.seed))
        return self._step(weights, batch, Choice(jnp.int32(ranking), jnp.bool_(setting.order == "score")))


def _make_step(
    graphdef: nnx.GraphDef[Any], like: Pruning, rankings: tuple[tuple[str, int], ...], data: DataConfig
) -> Callable[[Weights, dict[str, jax.Array], Choice], Outcome]:
    @jax.jit
    def step(weights: Weights, batch: dict[str, jax.Array], choice: Choice) -> Outcome:
        model = nnx.merge(graphdef, weights)
        model.eval()
        model.pruning = Selectable(
            after_blocks=like.after_blocks,
            keep_ratio=like.keep_ratio,
            alignment=like.alignment,
            rankings=rankings,
            choice=choice,
        )
        logits = model(normalize(batch["image"], data.mean, data.std))
        best = jnp.argmax(logits, axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return Outcome((best == batch["label"]).astype(jnp.int32), loss)

    return step
