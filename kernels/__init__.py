"""GPU kernels of the scan, imported as `top_jax.kernels`: the kernels and their launchers.

    operands, blocks     arguments and results of a scan; block sizes and tuning tables
    triton_kernels, triton_scan     the Triton kernels, and their launch through jax-triton
    pallas_scan          the same algorithm as Pallas kernels

No autodiff, no Flax and no choice of implementation: those are in `top_jax.ops`.
"""
