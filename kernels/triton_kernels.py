"""The aligned selective scan as raw Triton kernels; `triton_scan.py` launches them.

docs/concepts/kernels.md derives them.

One program per (image, direction, block of channels), sequential in L, with the state in registers. A program shares
nothing with another: it writes its own rows of y, and XLA sums the directions.

Letters: g direction, i place in the scan's own order, step = i counted from the front of the image (`reverse` counts
down), token = the row that step visits, row = the row its delta, B and C are read from (token, or step where
`reorder_parameters` is off). Steps are handled in chunks, unrolled. `A` comes multiplied by log2(e), because GPUs
compute exp2. Saved states lie in parts of four states, `[.., N / 4, E, 4]`, so that a warp writes whole sectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PART = tl.constexpr(4)  # states that a thread loads and stores at once


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
    gap,  # [G, B, L] float32, read if has_gap
    order,  # [G, B, L] int32, read if has_order
    # outputs
    y,  # [G, B, L, E]
    starts,  # [G, B, ceil(L / segment), block_n / 4, E, 4] float32, written if save
    batch: tl.constexpr,
    length: tl.constexpr,
    width: tl.constexpr,
    states: tl.constexpr,
    directions: tl.constexpr,
    reverse: tl.constexpr,  # bit g: direction g scans backwards
    u_shared: tl.constexpr,
    delta_shared: tl.constexpr,
    has_gap: tl.constexpr,
    has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
    save: tl.constexpr,
    segment: tl.constexpr,  # steps between two saved states, a multiple of chunk
    chunk: tl.constexpr,  # at most length
    block_e: tl.constexpr,
    block_n: tl.constexpr,
    pair: tl.constexpr,  # neighbouring channels of a thread, which owns all their states: 1 or 2
    ahead: tl.constexpr,  # B and C are fetched one step ahead; off where a thread has too many states
):
    """Scans; `save` keeps the state at the start of each segment. u and delta are fetched one chunk ahead."""
    parts: tl.constexpr = block_n // PART
    lanes: tl.constexpr = block_e // pair
    full: tl.constexpr = length // chunk
    rest: tl.constexpr = length - full * chunk
    slots: tl.constexpr = (length + segment - 1) // segment
    whole_e: tl.constexpr = width % block_e == 0
    packed: tl.constexpr = pair == 2 and u.dtype.element_ty == tl.bfloat16 and whole_e
    packed_delta: tl.constexpr = pair == 2 and delta.dtype.element_ty == tl.bfloat16 and whole_e
    span_u: tl.constexpr = width // 2 if packed else width  # from row to row
    span_delta: tl.constexpr = width // 2 if packed_delta else width

    g, image, lane, first, sign = my_scan(batch, length, directions, reverse)
    block = tl.program_id(1)
    n = tl.arange(0, PART)
    e = block * block_e + tl.arange(0, block_e)
    u_e = channels_of(u, image if u_shared else lane, block, length, width, lanes, pair, packed)
    delta_e = channels_of(delta, image if delta_shared else lane, block, length, width, lanes, pair, packed_delta)
    y_e = y + lane * (length * width) + e
    B_n = B + lane * (length * states) + tl.broadcast_to(n[None, :], [lanes, PART])
    C_n = C + lane * (length * states) + tl.broadcast_to(n[None, :], [lanes, PART])
    gap += lane * length
    order += lane * length
    starts += lane * (slots * parts * PART * width)

    a, h, skip, bias, dt_before = (), (), (), (), ()
    for p in tl.static_range(pair):
        e_p = tl.minimum(block * block_e + pair * tl.arange(0, lanes) + p, width - 1)
        skip += (tl.load(D + g * width + e_p),)
        bias += (tl.load(delta_bias + g * width + e_p),)
        dt_before += (tl.zeros([lanes], tl.float32),)
        for k in tl.static_range(parts):
            row = A + g * (width * states) + tl.broadcast_to(e_p[:, None] * states + n[None, :], [lanes, PART])
            a += (part_of(row, k, n, states),)
            h += (tl.zeros([lanes, PART], tl.float32),)

    us, deltas, gaps, tokens, b, c = (), (), (), (), (), ()
    for s in tl.static_range(chunk):
        step, token, row = place(order, s, first, sign, has_order, reorder_parameters)
        us += (tl.load(u_e + token * span_u),)
        deltas += (tl.load(delta_e + row * span_delta),)
        if has_gap:
            gaps += (tl.load(gap + step),)
        if has_order:
            tokens += (token,)
    if ahead:
        _, _, row = place(order, 0, first, sign, has_order, reorder_parameters)
        for k in tl.static_range(parts):
            b += (part_of(B_n + row * states, k, n, states),)
            c += (part_of(C_n + row * states, k, n, states),)

    for j in range(full):
        if save and (segment == chunk or j % (segment // chunk) == 0):
            keep(starts + (j // (segment // chunk)) * (parts * PART * width), h, block, n, width, lanes, pair, parts)
        us_next, deltas_next, gaps_next, tokens_next = (), (), (), ()
        next_chunk = tl.minimum((j + 1) * chunk, length - chunk)
        for s in tl.static_range(chunk):
            step, token, row = place(order, next_chunk + s, first, sign, has_order, reorder_parameters)
            us_next += (tl.load(u_e + token * span_u),)
            deltas_next += (tl.load(delta_e + row * span_delta),)
            if has_gap:
                gaps_next += (tl.load(gap + step),)
            if has_order:
                tokens_next += (token,)
            following = j * chunk + s + 1
            if s == chunk - 1:
                following = tl.minimum(following, length - 1)
            token = tokens[s] if has_order else first + sign * (j * chunk + s)
            h, dt_before, b, c = advance(
                h, a, b, c, us[s], deltas[s], gaps[s] if has_gap else 0.0, dt_before, skip, bias, B_n, C_n, order,
                following if ahead else j * chunk + s, first, sign, y_e + token * width, e, n, width, states, has_gap,
                has_order, reorder_parameters, ahead, pair, packed, packed_delta, lanes, parts,
            )  # fmt: skip
        us, deltas, gaps, tokens = us_next, deltas_next, gaps_next, tokens_next

    if rest > 0:  # the last chunk that was fetched ends with them
        if save and full * chunk % segment == 0:
            keep(starts + (full * chunk // segment) * (parts * PART * width), h, block, n, width, lanes, pair, parts)
        for s in tl.static_range(rest):
            token = tokens[chunk - rest + s] if has_order else first + sign * (full * chunk + s)
            h, dt_before, b, c = advance(
                h, a, b, c, us[chunk - rest + s], deltas[chunk - rest + s], gaps[chunk - rest + s] if has_gap else 0.0,
                dt_before, skip, bias, B_n, C_n, order, full * chunk + s + (1 if ahead and s + 1 < rest else 0), first,
                sign, y_e + token * width, e, n, width, states, has_gap, has_order, reorder_parameters, ahead, pair,
                packed, packed_delta, lanes, parts,
            )  # fmt: skip


@triton.jit
def advance(
    h, a, b, c, raw_u, raw_delta, gap_here, dt_before, skip, bias, B_n, C_n, order, at_b, first, sign, y_here, e, n,
    width: tl.constexpr, states: tl.constexpr, has_gap: tl.constexpr, has_order: tl.constexpr,
    reorder_parameters: tl.constexpr, ahead: tl.constexpr, pair: tl.constexpr, packed: tl.constexpr,
    packed_delta: tl.constexpr, lanes: tl.constexpr, parts: tl.constexpr,
):  # fmt: skip
    """One step of a thread's channels: stores y; returns new states, dt, and B and C of place `at_b` if `ahead`.

    Part by part: the next B and C arrive where those of this step have just become free.
    """
    _, _, row = place(order, at_b, first, sign, has_order, reorder_parameters)
    x = unpack(raw_u, pair, packed, lanes)
    raw = unpack(raw_delta, pair, packed_delta, lanes)
    dt, tau, drive = (), (), ()
    for p in tl.static_range(pair):
        dt_p = softplus(raw[p] + bias[p])
        dt += (dt_p,)
        tau += (dt_p + gap_here * dt_before[p] if has_gap else dt_p,)
        drive += (dt_p * x[p],)
    new, sums, b_next, c_next = (), (), (), ()
    for k in tl.static_range(parts):
        b_k = b[k] if ahead else part_of(B_n + row * states, k, n, states)
        c_k = c[k] if ahead else part_of(C_n + row * states, k, n, states)
        sums_k = ()
        for p in tl.static_range(pair):
            h_k = tl.exp2(tau[p][:, None] * a[p * parts + k]) * h[k * pair + p] + drive[p][:, None] * b_k
            new += (h_k,)
            sums_k += (h_k * c_k if k == 0 else sums[p] + h_k * c_k,)
        sums = sums_k
        if ahead:
            b_next += (part_of(B_n + row * states, k, n, states),)
            c_next += (part_of(C_n + row * states, k, n, states),)
    y = tl.sum(sums[0], axis=1) + skip[0] * x[0]
    if pair == 2:
        y = tl.reshape(tl.join(y, tl.sum(sums[1], axis=1) + skip[1] * x[1]), [2 * lanes])
    tl.store(y_here, y.to(y_here.dtype.element_ty), mask=None if width % (lanes * pair) == 0 else e < width)
    return new, dt, b_next, c_next


@triton.jit
def backward_kernel(
    # inputs: those of the forward, the states it saved, and the cotangent [B, L, E] of every direction's y
    u, delta, A, B, C, D, delta_bias, gap, order, starts, dout,
    # outputs
    du,  # [G, B, L, E]
    ddelta,  # [G, B, L, E]
    dA,  # [G, B, E, N] float32
    dB,  # [blocks, G, B, L, N] float32
    dC,  # [blocks, G, B, L, N] float32
    dD,  # [G, B, E] float32
    ddelta_bias,  # [G, B, E] float32
    scratch,  # [G, B, segment / chunk, block_n / 4, E, 4] float32, used if segment > chunk
    batch: tl.constexpr, length: tl.constexpr, width: tl.constexpr, states: tl.constexpr, directions: tl.constexpr,
    reverse: tl.constexpr, u_shared: tl.constexpr, delta_shared: tl.constexpr, has_gap: tl.constexpr,
    has_order: tl.constexpr, reorder_parameters: tl.constexpr,
    segment: tl.constexpr,  # steps between two saved states, a multiple of chunk
    chunk: tl.constexpr, block_e: tl.constexpr, block_n: tl.constexpr,
    alone: tl.constexpr,  # no two threads hold the same element, so that each reads from `scratch` what it wrote
):  # fmt: skip
    """Runs back through the chunks; everything of a chunk is loaded once, at its top.

    The states at the chunks of a segment are rebuilt from its saved state and wait in `scratch`.
    """
    g, image, lane, first, sign = my_scan(batch, length, directions, reverse)
    n = tl.arange(0, block_n)
    e = tl.program_id(1) * block_e + tl.arange(0, block_e)
    real_n, real_e = n < states, e < width
    real = real_e[:, None] & real_n[None, :]
    matrix = e[:, None] * states + n[None, :]
    in_parts = (n // PART * (width * PART) + n % PART)[None, :] + (e * PART)[:, None]
    chunks: tl.constexpr = (length + chunk - 1) // chunk
    segments: tl.constexpr = (length + segment - 1) // segment
    each: tl.constexpr = segment // chunk
    state_size: tl.constexpr = block_n * width
    rows = lane * (length * width)
    u += (image if u_shared else lane) * (length * width) + e
    delta += (image if delta_shared else lane) * (length * width) + e
    dout += image * (length * width) + e
    du += rows + e
    ddelta += rows + e
    B += lane * (length * states) + n
    C += lane * (length * states) + n
    dB += (tl.program_id(1) * (directions * batch) + lane) * (length * states) + n
    dC += (tl.program_id(1) * (directions * batch) + lane) * (length * states) + n
    gap += lane * length
    order += lane * length
    starts += lane * (segments * state_size)
    scratch += lane * (each * state_size)
    a = tl.load(A + g * (states * width) + matrix, mask=real, other=0.0)
    skip = tl.load(D + g * width + e, mask=real_e, other=0.0)
    bias = tl.load(delta_bias + g * width + e, mask=real_e, other=0.0)
    dh = tl.zeros([block_e, block_n], tl.float32)
    da = tl.zeros([block_e, block_n], tl.float32)
    dskip = tl.zeros([block_e], tl.float32)
    dbias = tl.zeros([block_e], tl.float32)
    from_gap = tl.zeros([block_e], tl.float32)  # gradient of dt through the gap after its token
    for number in range(chunks):
        c = chunks - 1 - number
        if each == 1:
            h = tl.load(starts + c * state_size + in_parts, mask=real, other=0.0)
        else:
            if (c + 1) % each == 0 or c == chunks - 1:  # a new segment: its states at all chunks up to this one
                i = c // each * segment
                h = tl.load(starts + c // each * state_size + in_parts, mask=real, other=0.0)
                dt_before = tl.zeros([block_e], tl.float32)
                if has_gap:
                    dt_before = dt_at(
                        delta, bias, order, i - 1, first, sign, width, real_e, has_order, reorder_parameters
                    )
                while i < c * chunk:
                    tl.store(scratch + i // chunk % each * state_size + in_parts, h, mask=real)
                    us, deltas, bs, gaps = (), (), (), ()
                    for s in tl.static_range(chunk):
                        step, token, row = place(order, i + s, first, sign, has_order, reorder_parameters)
                        us += (tl.load(u + token * width, mask=real_e, other=0.0),)
                        deltas += (tl.load(delta + row * width, mask=real_e, other=0.0),)
                        bs += (tl.load(B + row * states, mask=real_n, other=0.0),)
                        if has_gap:
                            gaps += (tl.load(gap + step),)
                    for s in tl.static_range(chunk):
                        dt = softplus(deltas[s].to(tl.float32) + bias)
                        tau = dt
                        if has_gap:
                            tau += gaps[s] * dt_before
                            dt_before = dt
                        h = tl.exp2(tau[:, None] * a) * h + (dt * us[s].to(tl.float32))[:, None] * bs[s][None, :]
                    i += chunk
                tl.store(scratch + c % each * state_size + in_parts, h, mask=real)
                if not alone:
                    tl.debug_barrier()
            h = tl.load(scratch + c % each * state_size + in_parts, mask=real, other=0.0)
        us, deltas, douts, bs, cs, gaps, tokens = (), (), (), (), (), (), ()
        for s in tl.static_range(chunk):
            i = tl.minimum(c * chunk + s, length - 1)
            step, token, row = place(order, i, first, sign, has_order, reorder_parameters)
            us += (tl.load(u + token * width, mask=real_e, other=0.0),)
            deltas += (tl.load(delta + row * width, mask=real_e, other=0.0),)
            douts += (tl.load(dout + token * width, mask=real_e, other=0.0),)
            bs += (tl.load(B + row * states, mask=real_n, other=0.0),)
            cs += (tl.load(C + row * states, mask=real_n, other=0.0),)
            if has_gap:
                gaps += (tl.load(gap + step),)
            if has_order:
                tokens += (token,)
        dt_before = tl.zeros([block_e], tl.float32)
        if has_gap:
            dt_before = dt_at(
                delta, bias, order, c * chunk - 1, first, sign, width, real_e, has_order, reorder_parameters
            )
        before, dts, taus, slopes = (), (), (), ()
        for s in tl.static_range(chunk):
            raw = deltas[s].to(tl.float32) + bias
            tail = log1p_series(tl.exp2(-tl.abs(raw) * LOG2_E))
            dt = tl.where(c * chunk + s < length, tl.maximum(raw, 0.0) + tail, 0.0)
            slopes += (tl.exp2((tl.minimum(raw, 0.0) - tail) * LOG2_E),)  # sigmoid(raw)
            dts += (dt,)
            if has_gap:
                taus += (dt + gaps[s] * dt_before,)
                dt_before = dt
            else:
                taus += (dt,)
            before += (h,)
            h = tl.exp2(taus[s][:, None] * a) * h + (dt * us[s].to(tl.float32))[:, None] * bs[s][None, :]
        before += (h,)
        for s in tl.static_range(chunk - 1, -1, -1):
            i = c * chunk + s
            inside = i < length
            step = first + sign * i
            token = tokens[s] if has_order else step
            row = token if reorder_parameters else step
            x = us[s].to(tl.float32)
            dy = tl.where(inside, douts[s].to(tl.float32), 0.0)
            dh += dy[:, None] * cs[s][None, :]
            dC_s = tl.sum(before[s + 1] * dy[:, None], axis=0)
            dB_s = tl.sum(dh * (dts[s] * x)[:, None], axis=0)
            tl.store(dC + row * states, dC_s, mask=real_n & inside)
            tl.store(dB + row * states, dB_s, mask=real_n & inside)
            ddrive = tl.sum(dh * bs[s][None, :], axis=1)
            dh *= tl.exp2(taus[s][:, None] * a)
            dexponent = dh * before[s]
            dtau = tl.sum(dexponent * a, axis=1) * LN_2  # a is log2(e) A
            da += dexponent * taus[s][:, None]
            ddt = ddrive * x + dtau
            if has_gap:
                ddt += from_gap
                from_gap = tl.where(inside, gaps[s] * dtau, 0.0)
            draw = tl.where(inside, ddt * slopes[s], 0.0)
            dskip += dy * x
            dbias += draw
            du_s = ddrive * dts[s] + skip * dy
            tl.store(du + token * width, du_s.to(du.dtype.element_ty), mask=real_e & inside)
            tl.store(ddelta + row * width, draw.to(ddelta.dtype.element_ty), mask=real_e & inside)
    tl.store(dA + lane * (states * width) + matrix, da, mask=real)
    tl.store(dD + lane * width + e, dskip, mask=real_e)
    tl.store(ddelta_bias + lane * width + e, dbias, mask=real_e)


@triton.jit
def my_scan(batch: tl.constexpr, length: tl.constexpr, directions: tl.constexpr, reverse: tl.constexpr):
    """This program's direction, image, row of arrays that have a row per scan, first step and sign of the next.

    Directions are the fastest axis, so that what they share is still in the cache.
    """
    g = tl.program_id(0) % directions
    image = (tl.program_id(0) // directions).to(tl.int64)
    if reverse == 0:
        first, sign = 0, 1
    elif reverse == (1 << directions) - 1:
        first, sign = length - 1, -1
    else:
        backwards = (reverse >> g) & 1
        first, sign = backwards * (length - 1), 1 - 2 * backwards
    return g, image, g * batch + image, first, sign


@triton.jit
def place(order, i, first, sign, has_order: tl.constexpr, reorder_parameters: tl.constexpr):
    """(step, token, row) of place i; letters as in the module docstring. `order` is that of the program's scan."""
    step = first + sign * i
    token = step
    if has_order:
        token = tl.load(order + step)
    row = token if reorder_parameters else step
    return step, token, row


@triton.jit
def dt_at(
    delta, bias, order, i, first, sign, width: tl.constexpr, real_e, has_order: tl.constexpr,
    reorder_parameters: tl.constexpr,
):  # fmt: skip
    """The time step `[E block]` after softplus of the token at place i; 0 at place -1."""
    _, _, row = place(order, tl.maximum(i, 0), first, sign, has_order, reorder_parameters)
    raw = tl.load(delta + row * width, mask=real_e, other=0.0).to(tl.float32) + bias
    return tl.where(i >= 0, softplus(raw), 0.0)


@triton.jit
def channels_of(
    x, scan, block, length: tl.constexpr, width: tl.constexpr, lanes: tl.constexpr, pair: tl.constexpr,
    packed: tl.constexpr,
):  # fmt: skip
    """Pointers to a program's channels of a scan's first row; past the last channel they point to that one.

    packed: two bfloat16 travel in an int32, which takes half the registers.
    """
    if packed:
        words = x.to(tl.pointer_type(tl.int32))
        return words + scan * (length * width // 2) + block * lanes + tl.arange(0, lanes)
    else:
        e = block * (lanes * pair) + tl.arange(0, lanes * pair)
        if width % (lanes * pair) != 0:
            e = tl.minimum(e, width - 1)
        return x + scan * (length * width) + e


@triton.jit
def unpack(raw, pair: tl.constexpr, packed: tl.constexpr, lanes: tl.constexpr):
    """float32 values `[lanes]` of each of a thread's channels, out of what `channels_of` points to."""
    if packed:
        return (raw << 16).to(tl.float32, bitcast=True), (raw & -65536).to(tl.float32, bitcast=True)
    elif pair == 2:
        even, odd = tl.split(tl.reshape(raw, [lanes, 2]))
        return even.to(tl.float32), odd.to(tl.float32)
    else:
        return (raw.to(tl.float32),)


@triton.jit
def part_of(row, k: tl.constexpr, n, states: tl.constexpr):
    """Part k of a row of states `[lanes, 4]`; zeros past the last state."""
    if (k + 1) * PART <= states:
        return tl.load(row + k * PART)
    else:
        return tl.load(row + k * PART, mask=(n + k * PART < states)[None, :], other=0.0)


@triton.jit
def keep(slot, h, block, n, width: tl.constexpr, lanes: tl.constexpr, pair: tl.constexpr, parts: tl.constexpr):
    """Saves the states of a program's channels."""
    for p in tl.static_range(pair):
        e = block * (lanes * pair) + pair * tl.arange(0, lanes) + p
        for k in tl.static_range(parts):
            at = slot + ((k * width + e)[:, None] * PART + n[None, :])
            if width % (lanes * pair) == 0:
                tl.store(at, h[k * pair + p])
            else:
                tl.store(at, h[k * pair + p], mask=(e < width)[:, None])


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to float32 accuracy for any x, without a division."""
    return tl.maximum(x, 0.0) + log1p_series(tl.exp2(-tl.abs(x) * LOG2_E))


@triton.jit
def log1p_series(t):
    """log(1 + t) for 0 <= t <= 1, relative error 2e-7: t times a minimax polynomial of log(1 + t) / t."""
    p = (0.005253457796 * t - 0.02958850739) * t + 0.07836166801
    p = ((p * t - 0.136747697) * t + 0.1911143108) * t - 0.2484436989
    return (((p * t + 0.3331927134) * t - 0.4999950152) * t + 0.9999999705) * t
