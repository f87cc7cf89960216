"""Multiply-accumulates of a model, counted from its sizes and its reduction schedule.

Conventions (every number we print names one):

    published        matrix products, convolutions and 9 L E N per scan; *one* of ViM's two scan directions, all four of
                     PlainMamba's; what acts on tokens is counted on the tokens that are there (a convolution on the
                     grid too); stem and head in; biases, norms and activations out. What the papers print as "FLOPs".
    all_directions   the same with both of ViM's directions.

One file per family says what its parts cost; `count.py` adds up.
"""

from top_jax.evaluation.flops.count import CONVENTIONS, Cost, count_macs

__all__ = ["CONVENTIONS", "Cost", "count_macs"]
