"""ViM's bidirectional Mamba mixer ("v2"): two scans of one projected sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.models import initializers as init
from top_jax.models.layers import causal_conv1d
from top_jax.models.scan_inputs import ScanInputs
from top_jax.models.vim_config import VimConfig
from top_jax.ops import selective_scan
from top_jax.pruning import Evidence, mean_time_step, scan_evidence
from top_jax.typing import Embedded, Inner, PerToken, Positions, Selective, StateMatrix


class ScanDirection(nnx.Module):
    """One direction with its own convolution, projections, A and D."""

    def __init__(self, config: VimConfig, *, reverse: bool, rngs: nnx.Rngs):
        self.config = config
        self.reverse = reverse
        width, rank, states = config.inner_dim, config.dt_rank, config.d_state
        taps = init.uniform(config.d_conv**-0.5)
        self.conv_kernel = nnx.Param(taps(rngs.params(), (config.d_conv, width)))
        self.conv_bias = nnx.Param(taps(rngs.params(), (width,)))
        self.x_proj = _linear(width, rank + 2 * states, init.uniform_fan_in, config, rngs)
        self.dt_proj = _linear(rank, width, init.uniform(rank**-0.5), config, rngs)
        # Officially only the forward direction gets Mamba's dt bias; the backward one starts at zero.
        start = jnp.zeros((width,), jnp.float32) if reverse else init.dt_bias(rngs.params(), (width,))
        self.dt_bias = nnx.Param(start)
        self.A_log = nnx.Param(init.a_log(width, states))
        self.D = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Inner, positions: Positions | None) -> tuple[Inner, PerToken]:
        """Convolves and scans the in-projected tokens; the gate comes after the sum over directions.

        Returns:
            y `[B, L, E]` in image order, and each token's mean time step, float32 `[B, L]`.
        """
        u, delta, B, C = self.project(x)
        y = selective_scan(
            u,
            delta,
            self.A,
            B,
            C,
            self.D[...],
            delta_bias=self.dt_bias[...],
            positions=positions,
            alignment="none" if positions is None else "decay",
            reverse=self.reverse,
            implementation=self.config.implementation,
            check_order=False,  # the model's own positions
        )
        return y, mean_time_step(delta, self.dt_bias[...])

    @property
    def A(self) -> StateMatrix:
        """float32 `[E, N]` decay rates."""
        return -jnp.exp(self.A_log[...])

    def project(self, x: Inner) -> tuple[Inner, Inner, Selective, Selective]:
        """u and delta `[B, L, E]`, B and C `[B, L, N]` of the in-projected tokens."""
        x = causal_conv1d(x, self.conv_kernel[...], self.conv_bias[...], reverse=self.reverse)
        x = jax.nn.silu(x)
        rank = self.config.dt_rank
        dt, B, C = jnp.split(self.x_proj(x), (rank, rank + self.config.d_state), axis=-1)
        return x, self.dt_proj(dt), B, C


class MambaMixer(nnx.Module):
    """in_proj -> (x, z); y = forward(x) + backward(x), gated by SiLU(z); out_proj(y / 2).

    Source: hustvl/Vim, mamba-1p1p1/mamba_ssm/modules/mamba_simple.py, `Mamba` with bimamba_type="v2" and
    if_divide_out=True.
    """

    def __init__(self, config: VimConfig, *, rngs: nnx.Rngs):
        width, inner = config.embed_dim, config.inner_dim
        self.in_proj = _linear(width, 2 * inner, init.uniform_fan_in, config, rngs)
        self.forward = ScanDirection(config, reverse=False, rngs=rngs)
        self.backward = ScanDirection(config, reverse=True, rngs=rngs)
        self.out_proj = _linear(inner, width, init.residual_out(config.depth), config, rngs)

    def __call__(self, x: Embedded, positions: Positions | None) -> tuple[Embedded, Evidence]:
        """Mixes `[B, L, D]`; also returns what the token scores need (`top_jax.pruning.scan_evidence`).

        Args:
            x: `[B, L, D]`, normed.
            positions: int32 `[B, L]` where pruned tokens are to be felt (`decay`), else None.
        """
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        (forward, forward_step), (backward, backward_step) = self.forward(x, positions), self.backward(x, positions)
        y = (forward + backward) * jax.nn.silu(z)
        return self.out_proj(y / 2), scan_evidence(y, forward_step + backward_step)

    def scan_inputs(self, x: Embedded, positions: Positions | None) -> ScanInputs:
        """What the two scans of `__call__` read, for the same arguments."""
        x, _ = jnp.split(self.in_proj(x), 2, axis=-1)
        directions = (self.forward, self.backward)
        u, delta, B, C = (jnp.stack(both) for both in zip(*(one.project(x) for one in directions), strict=True))
        return ScanInputs(
            u,
            delta,
            jnp.stack([one.A for one in directions]),
            B,
            C,
            jnp.stack([one.D[...] for one in directions]),
            jnp.stack([one.dt_bias[...] for one in directions]),
            reverse=tuple(one.reverse for one in directions),
            positions=None if positions is None else positions[None],
        )


def _linear(inputs: int, outputs: int, kernel_init: init.Initializer, config: VimConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """A projection without bias, computed in the model's dtype."""
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, kernel_init=kernel_init, rngs=rngs)
