"""The aligned selective scan as raw Triton kernels; `triton_scan.py` launches them.

docs/concepts/kernels.md derives them.

One program per (image, block of channels), sequential in L, with the state `[E block, N]` in registers; states trail,
so that a thread holds neighbouring ones and reads its part of B and C in one load. All directions run in one program,
one after the other: `total` carries their sum from sweep to sweep, and the last sweep applies the gate and the score.

Letters: g direction, i place in the scan's own order, step = i counted from the front of the image (`reverse` counts
down), token = the row that step visits, row = the row its delta, B and C are read from (token, or step where
`reorder_parameters` is off). Steps are handled in chunks, unrolled, with the loads of a chunk ahead of its arithmetic.
`A` comes multiplied by log2(e), because GPUs compute exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward_kernel(
    # inputs
    u,  # [G or 1, B, L, E]
    delta,  # [G or 1, B, L, E]
    A,  # [G, E, N] float32, times log2(e)
    B,  # [G, B, L, N] float32
    C,  # [G, B, L, N] float32
    D,  # [G, E] float32
    delta_bias,  # [G, E] float32
    z,  # [B, L, E], read if has_z
    gap,  # [G, B, L] float32, read if has_gap
    order,  # [G, B, L] int32, read if has_order
    # outputs
    out,  # [B, L, E]
    total,  # [B, L, E] float32, used if directions > 1
    starts,  # [G, B, chunks, E, N] float32, written if save
    score,  # [blocks, B, L] float32, written unless score_kind is "none"
    batch: tl.constexpr,
    length: tl.constexpr,
    width: tl.constexpr,
    states: tl.constexpr,
    directions: tl.constexpr,
    reverse: tl.constexpr,  # bit g: direction g scans backwards
    u_shared: tl.constexpr,
    delta_shared: tl.constexpr,
    has_z: tl.constexpr,
    has_gap: tl.constexpr,
    has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
    score_kind: tl.constexpr,
    save: tl.constexpr,
    chunk: tl.constexpr,
    block_e: tl.constexpr,
    block_n: tl.constexpr,
):
    """Scans, sums the directions, gates and scores; `save` keeps the state at the start of each chunk."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, block_n)
    e = tl.program_id(1) * block_e + tl.arange(0, block_e)
    real_n, real_e = n < states, e < width
    real = real_e[:, None] & real_n[None, :]
    matrix = e[:, None] * states + n[None, :]
    chunks: tl.constexpr = (length + chunk - 1) // chunk
    for g in range(directions):
        lane = g * batch + image  # row of arrays that no directions share
        backwards = ((reverse >> g) & 1) == 1
        u_g = u + (image if u_shared else lane) * length * width + e
        delta_g = delta + (image if delta_shared else lane) * length * width + e
        a = tl.load(A + g * states * width + matrix, mask=real, other=0.0)
        skip = tl.load(D + g * width + e, mask=real_e, other=0.0)
        bias = tl.load(delta_bias + g * width + e, mask=real_e, other=0.0)
        h = tl.zeros([block_e, block_n], tl.float32)
        dt_before = tl.zeros([block_e], tl.float32)
        for c in range(chunks):
            if save:
                tl.store(starts + (lane * chunks + c) * states * width + matrix, h, mask=real)
            us, deltas = (), ()
            for s in tl.static_range(chunk):
                inside, _, token, row = visit(
                    order, lane, c * chunk + s, length, backwards, has_order, reorder_parameters
                )
                us += (tl.load(u_g + token * width, mask=real_e & inside, other=0.0).to(tl.float32),)
                deltas += (tl.load(delta_g + row * width, mask=real_e & inside, other=0.0).to(tl.float32),)
            for s in tl.static_range(chunk):
                inside, step, token, row = visit(
                    order, lane, c * chunk + s, length, backwards, has_order, reorder_parameters
                )
                dt = tl.where(inside, softplus(deltas[s] + bias), 0.0)
                tau = dt
                if has_gap:
                    tau += tl.load(gap + lane * length + step, mask=inside, other=0.0) * dt_before
                    dt_before = dt
                here = (lane * length + row) * states + n
                b = tl.load(B + here, mask=real_n & inside, other=0.0)
                cc = tl.load(C + here, mask=real_n & inside, other=0.0)
                h = tl.exp2(tau[:, None] * a) * h + (dt * us[s])[:, None] * b[None, :]
                y = tl.sum(h * cc[None, :], axis=1) + skip * us[s]

                at, mine = (image * length + token) * width + e, real_e & inside
                if g > 0:
                    y += tl.load(total + at, mask=mine, other=0.0)
                if g < directions - 1:
                    tl.store(total + at, y, mask=mine)
                else:
                    if has_z:
                        y *= silu(tl.load(z + at, mask=mine, other=0.0).to(tl.float32))
                    tl.store(out + at, y.to(out.dtype.element_ty), mask=mine)
                    if score_kind != "none":
                        at_score = (tl.program_id(1) * batch + image) * length + token
                        tl.store(score + at_score, tl.sum(token_worth(y, score_kind), axis=0), mask=inside)
        if directions > 1:
            tl.debug_barrier()  # the next sweep reads what other threads of this program wrote to `total`


@triton.jit
def backward_kernel(
    # inputs: those of the forward, the states it saved, and the cotangent of `out`
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    z,
    gap,
    order,
    starts,
    dout,  # [B, L, E]
    # outputs; several programs leave partial sums, for a deterministic reduction outside
    du,  # [G, B, L, E]
    ddelta,  # [G, B, L, E]
    dA,  # [G, B, E, N] float32, by the unscaled A
    dB,  # [blocks, G, B, L, N] float32
    dC,  # [blocks, G, B, L, N] float32
    dD,  # [G, B, E] float32
    ddelta_bias,  # [G, B, E] float32
    dz,  # [B, L, E], written if has_z
    total,  # [B, L, E] float32, used if has_z and directions > 1
    batch: tl.constexpr,
    length: tl.constexpr,
    width: tl.constexpr,
    states: tl.constexpr,
    directions: tl.constexpr,
    reverse: tl.constexpr,
    u_shared: tl.constexpr,
    delta_shared: tl.constexpr,
    has_z: tl.constexpr,
    has_gap: tl.constexpr,
    has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
    chunk: tl.constexpr,
    block_e: tl.constexpr,
    block_n: tl.constexpr,
):
    """Visits the chunks in reverse, rebuilding the states of each from the one saved at its start."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, block_n)
    e = tl.program_id(1) * block_e + tl.arange(0, block_e)
    real_n, real_e = n < states, e < width
    real = real_e[:, None] & real_n[None, :]
    matrix = e[:, None] * states + n[None, :]
    chunks: tl.constexpr = (length + chunk - 1) // chunk
    for g in range(directions):
        lane = g * batch + image
        backwards = ((reverse >> g) & 1) == 1
        u_g = u + (image if u_shared else lane) * length * width + e
        delta_g = delta + (image if delta_shared else lane) * length * width + e
        a = tl.load(A + g * states * width + matrix, mask=real, other=0.0)
        skip = tl.load(D + g * width + e, mask=real_e, other=0.0)
        bias = tl.load(delta_bias + g * width + e, mask=real_e, other=0.0)
        dh = tl.zeros([block_e, block_n], tl.float32)
        da = tl.zeros([block_e, block_n], tl.float32)
        dskip = tl.zeros([block_e], tl.float32)
        dbias = tl.zeros([block_e], tl.float32)
        from_gap = tl.zeros([block_e], tl.float32)  # gradient of dt through the gap after its token
        for k in range(chunks):
            c = chunks - 1 - k
            h = tl.load(starts + (lane * chunks + c) * states * width + matrix, mask=real, other=0.0)
            dt_before = tl.zeros([block_e], tl.float32)
            if has_gap:
                dt_before = dt_at(
                    delta_g, bias, order, lane, c * chunk - 1, length, width, real_e, backwards, has_order,
                    reorder_parameters,
                )  # fmt: skip
            # Run the forward again through the chunk, keeping each step's decayed state: decay * h.
            carried, dts_before = (), ()
            for s in tl.static_range(chunk):
                inside, step, token, row = visit(
                    order, lane, c * chunk + s, length, backwards, has_order, reorder_parameters
                )
                x = tl.load(u_g + token * width, mask=real_e & inside, other=0.0).to(tl.float32)
                raw = tl.load(delta_g + row * width, mask=real_e & inside, other=0.0).to(tl.float32) + bias
                dt = tl.where(inside, softplus(raw), 0.0)
                tau = dt
                if has_gap:
                    tau += tl.load(gap + lane * length + step, mask=inside, other=0.0) * dt_before
                    dts_before += (dt_before,)
                    dt_before = dt
                b = tl.load(B + (lane * length + row) * states + n, mask=real_n & inside, other=0.0)
                carried += (tl.exp2(tau[:, None] * a) * h,)
                h = carried[s] + (dt * x)[:, None] * b[None, :]
            # Then the backward. Rows are loaded again (from the cache): keeping them, or the decays, spills registers.
            for s in tl.static_range(chunk - 1, -1, -1):
                inside, step, token, row = visit(
                    order, lane, c * chunk + s, length, backwards, has_order, reorder_parameters
                )
                x = tl.load(u_g + token * width, mask=real_e & inside, other=0.0).to(tl.float32)
                raw = tl.load(delta_g + row * width, mask=real_e & inside, other=0.0).to(tl.float32) + bias
                dt = tl.where(inside, softplus(raw), 0.0)
                tau = dt
                if has_gap:
                    gap_here = tl.load(gap + lane * length + step, mask=inside, other=0.0)
                    tau += gap_here * dts_before[s]
                drive = dt * x
                here = (lane * length + row) * states + n
                b = tl.load(B + here, mask=real_n & inside, other=0.0)
                cc = tl.load(C + here, mask=real_n & inside, other=0.0)

                at = (image * length + token) * width + e
                dy = tl.load(dout + at, mask=real_e & inside, other=0.0).to(tl.float32)
                if has_z:
                    gate = tl.load(z + at, mask=real_e & inside, other=0.0).to(tl.float32)
                    y = tl.sum((carried[s] + drive[:, None] * b[None, :]) * cc[None, :], axis=1) + skip * x
                    if g > 0:
                        y += tl.load(total + at, mask=real_e & inside, other=0.0)
                    if g < directions - 1:
                        tl.store(total + at, y, mask=real_e & inside)
                    else:
                        dz_here = dy * y * silu_slope(gate)
                        tl.store(dz + at, dz_here.to(dz.dtype.element_ty), mask=real_e & inside)
                    dy *= silu(gate)

                partial = ((tl.program_id(1) * directions * batch + lane) * length + row) * states + n
                dC_here = tl.sum(carried[s] * dy[:, None], axis=0) + b * tl.sum(drive * dy, axis=0)
                tl.store(dC + partial, dC_here, mask=real_n & inside)
                dh += dy[:, None] * cc[None, :]
                tl.store(dB + partial, tl.sum(dh * drive[:, None], axis=0), mask=real_n & inside)
                ddrive = tl.sum(dh * b[None, :], axis=1)
                dexponent = dh * carried[s]
                dtau = tl.sum(dexponent * a, axis=1) * LN_2  # a is log2(e) A
                da += dexponent * tau[:, None]
                dh *= tl.exp2(tau[:, None] * a)

                ddt = ddrive * x + dtau
                if has_gap:
                    ddt += from_gap
                    from_gap = gap_here * dtau
                draw = ddt * sigmoid(raw)
                dskip += dy * x
                dbias += draw
                mine = lane * length * width + e
                du_here = ddrive * dt + skip * dy
                tl.store(du + mine + token * width, du_here.to(du.dtype.element_ty), mask=real_e & inside)
                tl.store(ddelta + mine + row * width, draw.to(ddelta.dtype.element_ty), mask=real_e & inside)
        tl.store(dA + lane * states * width + matrix, da, mask=real)
        tl.store(dD + lane * width + e, dskip, mask=real_e)
        tl.store(ddelta_bias + lane * width + e, dbias, mask=real_e)
        if has_z and directions > 1:
            tl.debug_barrier()


@triton.jit
def visit(
    order,
    lane,
    i,
    length: tl.constexpr,
    backwards,
    has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
):
    """The indices of place i: (inside the sequence, step, token, row); letters as in the module docstring."""
    inside = (i >= 0) & (i < length)
    step = tl.where(backwards, length - 1 - i, i)
    token = step
    if has_order:
        token = tl.load(order + lane * length + step, mask=inside, other=0)
    row = token if reorder_parameters else step
    return inside, step, token, row


@triton.jit
def dt_at(
    delta_g,
    bias,
    order,
    lane,
    i,
    length: tl.constexpr,
    width: tl.constexpr,
    real_e,
    backwards,
    has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
):
    """The time step `[E block]` after softplus of the token at place i; 0 outside the sequence."""
    inside, _, _, row = visit(order, lane, i, length, backwards, has_order, reorder_parameters)
    raw = tl.load(delta_g + row * width, mask=real_e & inside, other=0.0).to(tl.float32) + bias
    return tl.where(inside, softplus(raw), 0.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to float32 accuracy for any x; log(1 + tiny) alone would lose small values."""
    tail = tl.exp2(-tl.abs(x) * LOG2_E)  # log1p(tail) = 2 artanh(tail / (2 + tail)), whose series converges quickly
    s = tail / (2.0 + tail)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); where exp overflows, the result is 0, which is correct."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of silu."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def token_worth(y, kind: tl.constexpr):
    """What a channel's y adds to the score of its token, before the mean over channels."""
    if kind == "clip":
        return tl.maximum(y, 0.0)
    elif kind == "l1":
        return tl.abs(y)
    elif kind == "l2":
        return y * y
    else:
        return y
