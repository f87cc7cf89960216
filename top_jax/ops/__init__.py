"""Public operations, which check their arguments, choose an implementation and define the gradients."""

from top_jax.kernels.operands import ScanArguments, ScanPlan
from top_jax.ops.alignment import ALIGNMENTS, check_alignment
from top_jax.ops.implementations import IMPLEMENTATIONS
from top_jax.ops.selective_scan import directional_scan, selective_scan

__all__ = [
    "ALIGNMENTS",
    "IMPLEMENTATIONS",
    "ScanArguments",
    "ScanPlan",
    "check_alignment",
    "directional_scan",
    "selective_scan",
]
