"""Ablations of token pruning on trained weights: the paper's tables on your own checkpoint.

A setting is a `Pruning`; the dense model is the one that prunes nothing.

    grid.py        which settings each table needs
    run.py         evaluates each setting on each checkpoint, without training and after fine-tuning; writes the report
    evaluate.py    the images, the compiled program that settings share, and its result for each image
    results.py     one row per checkpoint and setting, and the directory that holds them
    statistics.py  means of rows with their errors, and paired comparisons
    tables.py      markdown and CSV
    picture.py     accuracy or mIoU against cost
"""

from top_jax.ablation.grid import ALIGNMENTS, TABLES, base_pruning, make_grid
from top_jax.ablation.run import Finetune, run_ablation
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
