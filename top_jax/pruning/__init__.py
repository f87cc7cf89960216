"""Token reduction, above all pruning with hidden-state alignment (ToP, arXiv 2409.18962).

`top_jax.ops.alignment` defines the alignments: what the state of a scan does at the positions of pruned tokens.

A method is a `Reduction` (reduction.py). Its schedule lists, in Python ints, how many tokens stay after which block.
Its call maps `Tokens`, and a block's evidence about them (score.py), to fewer `Tokens` (tokens.py); the class token
always stays. Each method is one file: `Pruning` is ToP and its ablations (top.py), `Evit` fuses the tokens that it
drops (evit.py), `Merging` is that of ToMe and R-MeeTo (merging.py).
"""

from top_jax.pruning.evit import Evit
from top_jax.pruning.merging import Merging
from top_jax.pruning.methods import METHODS, make_reduction
from top_jax.pruning.reduction import Cut, Reduction
from top_jax.pruning.score import SCAN_EVIDENCE, Evidence, mean_time_step, scan_evidence
from top_jax.pruning.tokens import ClassHome, Tokens
from top_jax.pruning.top import WAYS, Pruning

__all__ = [
    "ClassHome",
    "METHODS",
    "Cut",
    "SCAN_EVIDENCE",
    "Evidence",
    "Evit",
    "Merging",
    "Pruning",
    "Reduction",
    "Tokens",
    "WAYS",
    "make_reduction",
    "mean_time_step",
    "scan_evidence",
]
