"""Public operations: they validate, choose an implementation and carry the gradients."""

from top_jax.ops.selective_scan import ALIGNMENTS, IMPLEMENTATIONS, check_alignment, selective_scan

__all__ = ["ALIGNMENTS", "IMPLEMENTATIONS", "check_alignment", "selective_scan"]
