"""Token pruning with hidden-state alignment (ToP, arXiv 2409.18962).

Tokens survive at positions p_1 < ... < p_K of the scan's own order; gap_i = p_i - p_{i-1} - 1 for i >= 2, gap_1 = 0.
The alignment says what a pruned position q did to the scan's state, and so what kept token i becomes:

    none    q never existed: tokens are re-indexed as in a smaller image, the class token moved back to the middle
            (the ViT way, the paper's failing baseline)
            h_i = exp(delta_i A) h_{i-1} + delta_i B_i u_i
    hold    h_q = h_{q-1}, the state of the previous remaining neighbour (the paper's)
            the same recurrence, in the original order of the tokens
    decay   h_q = exp(delta_prev A) h_{q-1}, delta_prev that of the nearest kept token before q: the gap is felt (ours)
            h_i = exp((delta_i + gap_i delta_{i-1}) A) h_{i-1} + delta_i B_i u_i

The data flows schedule -> score -> select, between two blocks: `Pruning` says where and how many (Python ints),
`token_scores` ranks, `prune` keeps and gathers.
"""

from top_jax.pruning.schedule import Pruning
from top_jax.pruning.score import Evidence, output_evidence, token_scores
from top_jax.pruning.select import prune
from top_jax.pruning.tokens import Tokens

__all__ = ["Evidence", "Pruning", "Tokens", "output_evidence", "prune", "token_scores"]
