"""Raw accelerator code, imported as `top_jax.kernels`: kernels and their launchers, jax only.

    operands, blocks     what the GPU kernels read and write, and how they cut it up
    triton_kernels, triton_scan     the Triton kernels, and their launch through jax-triton
    pallas_scan          the same as Pallas kernels
    chunked_scan         the recurrence in XLA operations

No autodiff, no Flax and no dispatch: those live in `top_jax.ops`.
"""
