"""Token reduction, above all pruning with hidden-state alignment (ToP, arXiv 2409.18962).

Tokens survive at positions p_1 < ... < p_K of the scan's own order; gap_i = p_i - p_{i-1} - 1 for i >= 2, gap_1 = 0.
The alignment says what happens to the scan's state h at a pruned position q, and so what kept token i computes:

    none    q does not exist: tokens are re-indexed as in a smaller image, and the class token moves back to the middle
            (how a ViT is pruned; the paper's failing baseline)
            h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i
    hold    h_q = h_{q-1}: q takes the state of the previous remaining token (the paper's)
            h_i as above, in the original order of the tokens
    decay   h_q = exp(delta_prev A) h_{q-1}: the state also decays at q, by the time step delta_prev of the nearest kept
            token before q (ours)
            h_i = exp((delta_i + gap_i delta_{i-1}) A) h_{i-1} + delta_i B_i u_i

A method is a `Reduction` (reduction.py). Its schedule says where and how many tokens stay, in Python ints. Its call
maps `Tokens`, and what a block says about them, to fewer `Tokens`. Each method is one file: `Pruning` is ToP and its
ablations (top.py), `Evit` fuses the tokens that it drops (evit.py), `Merging` is ToMe's and R-MeeTo's (merging.py).
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
