"""Token reduction, above all pruning with hidden-state alignment (ToP, arXiv 2409.18962).

Tokens survive at positions p_1 < ... < p_K of the scan's own order; gap_i = p_i - p_{i-1} - 1 for i >= 2, gap_1 = 0.
The alignment says what a pruned position q did to the scan's state, and so what kept token i becomes:

    none    q never existed: tokens are re-indexed as in a smaller image, the class token moved back to the middle
            (the ViT way, the paper's failing baseline)
            h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i
    hold    h_q = h_{q-1}, the state of the previous remaining neighbour (the paper's)
            the same recurrence, in the original order of the tokens
    decay   h_q = exp(delta_prev A) h_{q-1}, delta_prev that of the nearest kept token before q: the gap is felt (ours)
            h_i = exp((delta_i + gap_i delta_{i-1}) A) h_{i-1} + delta_i B_i u_i

A method is a `Reduction` (reduction.py): Python ints that say where and how many tokens stay, and a call that maps
`Tokens` and what a block tells about them to fewer `Tokens`. Each is one file: `Pruning` is ToP and its ablations
(top.py), `Evit` fuses what it drops (evit.py), `Merging` is ToMe's and R-MeeTo's (merging.py).
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
