"""Multiply-accumulates of a model, counted from its sizes and its reduction schedule.

Every number that we print names its convention:

    published        What the papers print as "FLOPs": matrix products, convolutions and 9 L E N per scan, stem and head
                     included; biases, norms and activations excluded. ViM counts *one* of its two scan directions,
                     PlainMamba all four. What acts on tokens, including a convolution on the grid, is counted for the
                     tokens that are left.
    all_directions   The same with both directions of ViM.
    executed         What our code computes: both directions of ViM; PlainMamba's convolutions on every cell of their
                     grid, empty or not (the image's grid, or the condensed one of alignment `none`), and its
                     `direction_Bs`, which a product looks up; the products with which `Evit` fuses and `Merging`
                     compares and merges. A scan is 9 L E N as in the others, so that the three can be compared; 4 of
                     the 9 are multiplications. Scores, biases, norms, gates and activations, which multiply element by
                     element, are excluded here too.

A convolution's taps on the zeros beyond the border count in all three.

`parts.py` defines the cost of each part of a model family, and `count.py` adds them up. `of_config.py` counts for a
run's config and checks `executed` against the model that JAX traces, which `traced.py` counts.
"""

from top_jax.evaluation.flops.count import Cost, count_macs
from top_jax.evaluation.flops.parts import CONVENTIONS, PART_NAMES

__all__ = ["CONVENTIONS", "PART_NAMES", "Cost", "count_macs"]
