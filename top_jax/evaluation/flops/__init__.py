"""Multiply-accumulates of a model, counted from its sizes and its reduction schedule.

Conventions (every number we print names one):

    published        matrix products, convolutions and 9 L E N per scan; *one* of ViM's two scan directions, all four of
                     PlainMamba's; what acts on tokens is counted on the tokens that are there (a convolution on the
                     grid too); stem and head in; biases, norms and activations out. What the papers print as "FLOPs".
    all_directions   the same with both of ViM's directions.
    executed         what our code does: both of ViM's directions; PlainMamba's convolutions on every cell of their grid
                     (the image's, or the condensed one of `none`), empty or not, and its `direction_Bs`, which a
                     product looks up; the products with which EViT fuses and `Merging` compares and merges; 9 L E N
                     per scan as in the others, so that the three can be compared (4 of the 9 are multiplications). A
                     tap that meets zeros beyond the border counts in all conventions. Scores, biases, norms, gates
                     and activations, which multiply element by element, are out here too.

`executed` is checked against what JAX is given to compile (`cross_check.py`). One file per family says what its parts
cost, `reductions.py` what reducing costs; `count.py` adds up.
"""

from top_jax.evaluation.flops.count import CONVENTIONS, Cost, count_macs

__all__ = ["CONVENTIONS", "Cost", "count_macs"]
