"""Raw accelerator code, imported as `top_jax.kernels`: one kernel and its launcher per file, jax only.

No autodiff, no Flax, no dispatch and no validation: those live in `top_jax.ops`.
"""
