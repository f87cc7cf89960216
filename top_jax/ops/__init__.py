"""Public operations: they validate, choose an implementation and carry the gradients."""

from top_jax.ops.checks import ALIGNMENTS, check_alignment
from top_jax.ops.directional_scan import directional_scan
from top_jax.ops.implementations import IMPLEMENTATIONS
from top_jax.ops.selective_scan import selective_scan

__all__ = ["ALIGNMENTS", "IMPLEMENTATIONS", "check_alignment", "directional_scan", "selective_scan"]
