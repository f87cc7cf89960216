"""PlainMamba's mixer: a convolution on the grid, then one sequence scanned along four paths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from top_jax.models import initializers as init
from top_jax.models.depthwise_conv import depthwise_conv2d
from top_jax.models.plain_mamba_config import PlainMambaConfig
from top_jax.models.scan_inputs import ScanInputs
from top_jax.models.traversals import DIRECTIONS, Traversals, from_cells, to_cells
from top_jax.ops import directional_scan
from top_jax.pruning import Evidence, mean_time_step, scan_evidence
from top_jax.typing import Array, Embedded, Float, Inner, PerToken


class PlainMambaMixer(nnx.Module):
    """in_proj -> (x, z); x convolved on the grid; y = sum of four scans, gated by SiLU(z); out_proj(y).

    Two quirks of the official code, which its checkpoints are trained with and which we keep:

    * In each traversal only u is put into the traversal's order; delta, B and C stay in raster order, so that step i
      scans u of the token it visits with the parameters of raster token i. `reorder_parameters=True` is the
      corrected form, for models trained here.
    * dt_proj's bias enters twice: in the projection, and again before softplus.

    Source: ChenhongyiYang/PlainMamba, plain_mamba_layer.py, `PlainMamba2D`.
    """

    def __init__(self, config: PlainMambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, inner, states, taps = config.embed_dim, config.inner_dim, config.d_state, config.d_conv
        self.in_proj = _linear(width, 2 * inner, config, rngs)
        bound = init.uniform(1 / taps)  # 1 / sqrt(taps * taps)
        self.conv_kernel = nnx.Param(bound(rngs.params(), (taps, taps, inner)))
        self.conv_bias = nnx.Param(bound(rngs.params(), (inner,)))
        self.x_proj = _linear(inner, config.dt_rank + 2 * states, config, rngs, use_bias=False)
        self.dt_proj = _linear(config.dt_rank, inner, config, rngs)
        self.A_log = nnx.Param(init.a_log(inner, states))
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32))
        self.direction_Bs = nnx.Param(init.trunc_normal(rngs.params(), (DIRECTIONS + 1, states)))
        self.out_proj = _linear(inner, width, config, rngs)

    def __call__(self, x: Embedded, paths: Traversals) -> tuple[Embedded, Evidence]:
        """Mixes `[B, L, D]`; also returns what the token scores need (`top_jax.pruning.scan_evidence`)."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        scan = self._project(x, paths)
        y, _ = directional_scan(
            scan.u,
            scan.delta,
            scan.A,
            scan.B,
            scan.C,
            scan.D,
            z,
            scan.delta_bias,
            reverse=scan.reverse,
            order=scan.order,
            reorder_parameters=scan.reorder_parameters,
            positions=scan.positions,
            alignment=scan.alignment,
            implementation=self.config.implementation,
            check_order=False,  # the model's own
        )
        time_step = mean_time_step(scan.delta[0], scan.delta_bias[0])
        return self.out_proj(y), scan_evidence(y, self._time_step(time_step, paths))

    def scan_inputs(self, x: Embedded, paths: Traversals) -> ScanInputs:
        """What the four scans of `__call__` read, for the same arguments."""
        return self._project(jnp.split(self.in_proj(x), 2, axis=-1)[0], paths)

    def _project(self, x: Inner, paths: Traversals) -> ScanInputs:
        x = jax.nn.silu(self._convolved(x, paths))
        rank = self.config.dt_rank
        dt, B, C = jnp.split(self.x_proj(x), (rank, rank + self.config.d_state), axis=-1)
        assert self.dt_proj.bias is not None
        return ScanInputs(
            x[None],
            self.dt_proj(dt)[None],
            -jnp.exp(self.A_log[...])[None],
            B[None].astype(jnp.float32) + self._direction_B(paths),  # 0.02 beside 1 is little in bfloat16
            C[None],
            self.D[...][None],
            self.dt_proj.bias[...][None],
            reverse=(False,) * DIRECTIONS,
            order=paths.order,
            reorder_parameters=self.config.reorder_parameters,
            positions=paths.positions,
        )

    def _convolved(self, x: Inner, paths: Traversals) -> Inner:
        grid = depthwise_conv2d(to_cells(x, paths), self.conv_kernel[...].astype(x.dtype))
        return from_cells(grid, paths) + self.conv_bias[...].astype(x.dtype)[None, None, :]

    def _direction_B(self, paths: Traversals) -> Float[Array, "4 B L N"]:
        """The vector of the move of each step. A product, because its gradient sums in a fixed order."""
        chosen = jax.nn.one_hot(paths.moves, DIRECTIONS + 1, dtype=jnp.float32)
        return jnp.einsum("gblm,mn->gbln", chosen, self.direction_Bs[...], precision=jax.lax.Precision.HIGHEST)

    def _time_step(self, mean: PerToken, paths: Traversals) -> PerToken:
        """The time steps with which the four scans took each token in, summed; `mean` is that of each raster token."""
        if self.config.reorder_parameters:
            return DIRECTIONS * mean
        step_of_token = jnp.argsort(paths.order, axis=-1)
        return jnp.sum(jnp.take_along_axis(mean[None], step_of_token, axis=-1), axis=0)


def _linear(
    inputs: int, outputs: int, config: PlainMambaConfig, rngs: nnx.Rngs, *, use_bias: bool = True
) -> nnx.Linear:
    """A projection computed in the model's dtype, started as the official training configs have it.

    They start *every* linear layer so, the time step's too: mmcls applies `init_cfg` after the layer's own start.
    """
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=config.dtype, kernel_init=init.trunc_normal, rngs=rngs)
