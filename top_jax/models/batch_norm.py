"""Batch normalisation as torch.nn.BatchNorm2d does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.typing import Array, Float


class BatchNorm(nnx.Module):
    """Normalises each channel over all other axes, in float32.

    In train mode with the batch's own mean and variance, which also move the running ones by `momentum`; the running
    variance takes the unbiased one, n / (n - 1) times the other, as PyTorch's does and flax.nnx.BatchNorm's does not.
    In eval mode with the running ones. Over a mesh the batch is the whole one, on all devices.

    Source: torch.nn.BatchNorm2d (momentum 0.1, eps 1e-5).
    """

    def __init__(self, width: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False  # set by Module.train() and Module.eval()
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))
        # PyTorch's num_batches_tracked, kept for it alone; a float, so that jax.grad takes the model as it is.
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises `[..., D]`; the result has the dtype of x."""
        x32 = x.astype(jnp.float32)
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = jnp.mean(x32, axis=range(x.ndim - 1))
            var = jnp.var(x32, axis=range(x.ndim - 1))
            self._update(mean, var, count=x.size // x.shape[-1])
        scale = jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
        shape = (1,) * (x.ndim - 1) + (-1,)
        return ((x32 - mean.reshape(shape)) * scale.reshape(shape) + self.bias[...].reshape(shape)).astype(x.dtype)

    def _update(self, mean: Float[Array, " D"], var: Float[Array, " D"], count: int) -> None:
        mean, var = jax.lax.stop_gradient((mean, var))
        kept, new = 1 - self.momentum, self.momentum
        self.mean[...] = kept * self.mean[...] + new * mean
        self.var[...] = kept * self.var[...] + new * var * (count / max(count - 1, 1))
        self.num_batches[...] += 1


def moves_statistics(module: nnx.Module) -> bool:
    """Whether a call of `module` would move the statistics of a BatchNorm in it."""
    return any(isinstance(part, BatchNorm) and not part.use_running_average for _, part in nnx.iter_modules(module))
