"""The selective scan in plain XLA operations, for CPU, TPU and any shape, with a hand-written gradient.

Everything that is O(B L E) (bias, softplus, gaps, skip) is ordinary JAX with automatic gradients. Only the recurrence
has a hand-written one, because autodiff would store every state::

    h_t = exp(tau_t A) h_{t-1} + x_t B_t            y_t = C_t . h_t            (float32 throughout)

In the recurrence, time is the first axis and channels are the last: the carried state is `[B, N, E]`, so that every
step is one contiguous, vectorised pass. The sequence is cut into chunks. The forward saves only the state at the start
of each chunk; the backward rebuilds the states of one chunk at a time. So memory is O(B L E + B (L / chunk) E N) and
never O(B L E N). Nothing is divided by a decay: exp(-sum) overflows for the decays of a trained model.
"""

from __future__ import annotations

from functools import partial
from typing import Final, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from top_jax.kernels.operands import ScanArguments
from top_jax.ops.directions import kept_of_a_scan
from top_jax.typing import Array, Float, Inner

# Measured on 2 cores of an AMD EPYC, 2026-11-23, at B 8, L 197, E 384, N 16: 6, 8 and 12 take the same time within 5 %,
# 4 takes 28 % more than 8, and 16 9 % more (docs/results/cpu.md).
LONGEST_CHUNK: Final = 8

# By default a product of float32 matrices is rounded to TF32 on a GPU and to bfloat16 on a TPU.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

Tree = TypeVar("Tree")


class Steps(NamedTuple):
    """Inputs of the recurrence at each step, time first, float32.

    Attributes:
        tau: `[L, B, E]` decay time of each step (delta, plus what a gap before the token adds).
        x: `[L, B, E]` drive, delta * u.
        B: `[L, B, N]` input projection.
        C: `[L, B, N]` output projection.
    """

    tau: Float[Array, "L B E"]
    x: Float[Array, "L B E"]
    B: Float[Array, "L B N"]
    C: Float[Array, "L B N"]


def selective_scan_xla(one: ScanArguments, reverse: bool) -> Inner:
    """Scans one direction in chunks, with its own gradient; arguments and result as in `selective_scan_reference`."""
    u, delta, A, B, C = (a.astype(jnp.float32) for a in (one.u, one.delta, one.A, one.B, one.C))
    bias = one.delta_bias
    delta = jax.nn.softplus(delta if bias is None else delta + bias.astype(jnp.float32)[None, None, :])
    tau = delta if one.gap is None else delta + one.gap.astype(jnp.float32)[:, :, None] * scanned_before(delta, reverse)

    steps = Steps(*(jnp.moveaxis(a, 1, 0) for a in (tau, delta * u, B, C)))
    # Within shard_map each device has its own tokens, and all share A. Adding zeros made from the tokens marks A as
    # varying over the devices, which its gradient rule needs; JAX then sums the gradients over the devices.
    A = A + jnp.sum(jnp.zeros_like(u), axis=(0, 1))[:, None]
    y = jnp.moveaxis(_recurrence(reverse, steps, A.T), 0, 1)
    return y if one.D is None else y + one.D.astype(jnp.float32)[None, None, :] * u


def scanned_before(delta: Inner, reverse: bool) -> Inner:
    """Returns the delta of the token scanned before each token; zero for the first."""
    if reverse:
        return jnp.pad(delta[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.pad(delta[:, :-1], ((0, 0), (1, 0), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(reverse: bool, steps: Steps, A: jax.Array) -> jax.Array:
    return scan_forward(steps, A, reverse=reverse)


def _forward(reverse: bool, steps: Steps, A: jax.Array):
    y, starts = chunked_scan_forward(steps, A, reverse=reverse)
    return y, (steps, A, kept_of_a_scan(starts))


def _backward(reverse: bool, saved: tuple[Steps, jax.Array, jax.Array], dy: jax.Array):
    steps, A, starts = saved
    return chunked_scan_backward(steps, A, starts, dy, reverse=reverse)


_recurrence.defvjp(_forward, _backward)


def scan_forward(inputs: Steps, A: jax.Array, *, reverse: bool) -> jax.Array:
    """Runs the recurrence over all steps and saves no state, for a forward pass without a gradient.

    Args:
        inputs: float32 steps, time first.
        A: `[N, E]` float32 decay rates.
        reverse: visit the last step first.

    Returns:
        y `[L, B, E]`.
    """
    return _run(_initial_state(inputs, A), inputs, A, reverse)[1]


def chunked_scan_forward(
    inputs: Steps, A: jax.Array, *, reverse: bool, longest_chunk: int = LONGEST_CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence and saves the state at the start of each chunk, for its backward.

    Args:
        inputs: float32 steps, time first.
        A: `[N, E]` float32 decay rates.
        reverse: visit the last step first.
        longest_chunk: largest number of steps between two saved states; chunk lengths are as equal as possible.

    Returns:
        y `[L, B, E]`, and the state `[ceil(L / longest_chunk), B, N, E]` at the start of each chunk.
    """
    length = len(inputs.x)
    chunks = -(-length // longest_chunk)

    def run_chunk(h: jax.Array, steps: Steps) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h_end, y = _run(h, steps, A, reverse)
        return h_end, (h, y)

    _, (starts, y) = jax.lax.scan(run_chunk, _initial_state(inputs, A), _split(inputs, chunks), reverse=reverse)
    return _join(y, length), starts


def chunked_scan_backward(
    inputs: Steps, A: jax.Array, starts: jax.Array, dy: jax.Array, *, reverse: bool
) -> tuple[Steps, jax.Array]:
    """Computes the gradients of sum(y * dy), visiting the chunks in the opposite order of the forward.

    Args:
        inputs: the forward's inputs.
        A: `[N, E]` float32 decay rates.
        starts: the chunk-start states that the forward returned.
        dy: `[L, B, E]` float32 cotangent of y.
        reverse: the forward's direction.

    Returns:
        The gradients of the inputs, shaped like them, and of A `[N, E]`.
    """
    length = dy.shape[0]

    def rebuild(h: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        decay, B, x = now
        carried = decay * h
        return carried + _outer(B, x), carried

    def pull_back(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, Steps, jax.Array, jax.Array]):
        dh, dA = carry
        decay, step, carried, dy = now
        dh = dh + _outer(step.C, dy)
        return (decay * dh, dA + dh * carried * step.tau[:, None, :]), dh

    def run_chunk(carry: tuple[jax.Array, jax.Array], saved: tuple[Steps, jax.Array, jax.Array]):
        steps, h, dy = saved
        decay = _decay(steps.tau, A[None, None])  # [chunk, B, N, E], the only exponentials of the backward
        _, carried = jax.lax.scan(rebuild, h, (decay, steps.B, steps.x), reverse=reverse)
        carry, adjoint = jax.lax.scan(pull_back, carry, (decay, steps, carried, dy), reverse=not reverse)

        # Every contraction is a matrix product: a plain sum over N would first write out its factors at full size.
        flow = adjoint * carried * A[None, None]  # each state's part of the gradient of its tau
        return carry, Steps(
            tau=_sum_over_n(flow, jnp.ones_like(steps.B)),
            x=_sum_over_n(adjoint, steps.B),
            B=_sum_over_e(adjoint, steps.x),
            # The state is carried + B x; its second part needs no [chunk, B, N, E].
            C=_sum_over_e(carried, dy) + steps.B * jnp.sum(steps.x * dy, axis=-1, keepdims=True),
        )

    # A's gradient is summed per image, step by step, where both factors are still in the cache.
    start = (jnp.zeros_like(starts[0]), jnp.zeros_like(starts[0]))
    chunks = len(starts)
    saved = (_split(inputs, chunks), starts, _split(dy, chunks))
    (_, dA), grads = jax.lax.scan(run_chunk, start, saved, reverse=not reverse)
    return jax.tree.map(lambda grad: _join(grad, length), grads), jnp.sum(dA, axis=0)


def _run(h: jax.Array, steps: Steps, A: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Runs some steps from state h `[B, N, E]`; returns the last state, and y of each step."""

    def step(h: jax.Array, now: Steps) -> tuple[jax.Array, jax.Array]:
        h = _decay(now.tau, A[None]) * h + _outer(now.B, now.x)
        return h, _einsum("bne,bn->be", h, now.C)

    return jax.lax.scan(step, h, steps, reverse=reverse)


def _initial_state(inputs: Steps, A: jax.Array) -> jax.Array:
    # Made from the inputs, so that under shard_map or an explicit mesh it varies over the devices like them.
    return jnp.zeros_like(inputs.x[0])[:, None, :] + jnp.zeros_like(A)[None]


def _decay(tau: jax.Array, A: jax.Array) -> jax.Array:
    """Returns exp(tau A), `[..., N, E]`, for tau `[..., E]` and A `[N, E]` with leading axes of length 1."""
    return jnp.exp(tau[..., None, :] * A)


def _outer(over_n: jax.Array, over_e: jax.Array) -> jax.Array:
    """Returns the outer products `[..., N, E]` of `[..., N]` and `[..., E]`."""
    return over_n[..., :, None] * over_e[..., None, :]


def _sum_over_n(a: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums `[chunk, B, N, E]` over N to `[chunk, B, E]`, with weights `[chunk, B, N]`."""
    return _einsum("tbne,tbn->tbe", a, weights)


def _sum_over_e(a: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums `[chunk, B, N, E]` over E to `[chunk, B, N]`, with weights `[chunk, B, E]`."""
    return _einsum("tbne,tbe->tbn", a, weights)


def _split(steps: Tree, chunks: int) -> Tree:
    """Cuts `[L, ...]` into `[chunks, chunk, ...]`, padded with zero steps, which leave a state unchanged."""

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, -len(a) % chunks)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(chunks, -1, *a.shape[1:])

    return jax.tree.map(split, steps)


def _join(chunks: jax.Array, length: int) -> jax.Array:
    """Joins chunks to `[L, ...]`: the inverse of `_split`."""
    return chunks.reshape(-1, *chunks.shape[2:])[:length]
