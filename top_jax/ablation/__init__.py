"""Ablations of token pruning on trained weights: the paper's tables on a checkpoint of one's own.

A setting is a `Pruning`, and the dense model the one that prunes nothing. `grid.py` says which settings a table needs,
`run_ablation` evaluates each on every checkpoint (and, if asked to, after a short fine-tuning), `summarise` makes means
and errors of the rows, and `report.py` tables and a picture of those.
"""

from top_jax.ablation.finetune import Finetune
from top_jax.ablation.grid import ALIGNMENTS, TABLES, base_pruning, make_grid
from top_jax.ablation.run import run_ablation
from top_jax.ablation.statistics import Cell, Comparison, compare, summarise

__all__ = [
    "ALIGNMENTS",
    "TABLES",
    "Cell",
    "Comparison",
    "Finetune",
    "base_pruning",
    "compare",
    "make_grid",
    "run_ablation",
    "summarise",
]
