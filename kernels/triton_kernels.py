"""The aligned selective scan as raw Triton kernels; `triton_scan.py` launches, docs/concepts/kernels.md derives them.

One program per (image, direction, block of channels), sequential in L, with the state in registers. A program shares
nothing with another: it writes its own rows of y, and XLA sums the directions.

Letters: g direction, i index in the scan's own order, step = i counted from the front of the image (`reverse` counts
down), token = the row that step visits, row = the row its delta, B and C are read from (token, or step where
`reorder_parameters` is off). Steps are handled in chunks, unrolled. `A` comes multiplied by log2(e), because GPUs
compute exp2. Saved states are stored in parts of four, `[.., N / 4, E, 4]`, so that a warp writes whole sectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
PART = tl.constexpr(4)  # states that a thread loads and stores at once
CHUNK = tl.constexpr(4)  # steps whose states the backward keeps at a time
LANES_E = tl.constexpr(32 // 4)  # lanes of the backward that share its states


@triton.jit
def forward_kernel(
    # inputs
    u, delta,  # [G or 1, B, L, E]
    A,  # [G, E, N] float32, times log2(e)
    B, C,  # [G, B, L, N] float32
    D, delta_bias,  # [G, E] float32
    gap,  # [G, B, L] float32, read if has_gap
    order,  # [G, B, L] int32, read if has_order
    # outputs
    y,  # [G, B, L, E]
    starts,  # [G, B, ceil(L / segment), block_n / 4, E, 4] float32, written if save
    batch: tl.constexpr, length: tl.constexpr, width: tl.constexpr, states: tl.constexpr, directions: tl.constexpr,
    reverse: tl.constexpr,  # bit g: direction g scans backwards
    u_shared: tl.constexpr, delta_shared: tl.constexpr, has_gap: tl.constexpr, has_order: tl.constexpr,
    reorder_parameters: tl.constexpr, save: tl.constexpr, block_e: tl.constexpr, block_n: tl.constexpr,
    segment: tl.constexpr,  # steps between two saved states, a multiple of chunk
    chunk: tl.constexpr,  # at most length
    pair: tl.constexpr,  # neighbouring channels of a thread, which owns all their states: 1 or 2
    ahead: tl.constexpr,  # B and C are fetched one step ahead; off where a thread has too many states
):  # fmt: skip
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

    if rest > 0:  # the rest is the end of the last chunk that was fetched
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
    """Runs one step for a thread's channels: stores y; returns the new states, dt and, if `ahead`, B and C at `at_b`.

    Works part by part, so that the next B and C are loaded into the registers that those of this step have just left.
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
    du, ddelta,  # [G, B, L, E]
    dA,  # [G, B, E, N] float32
    dB, dC,  # [blocks, G, B, L, N] float32
    dD, ddelta_bias,  # [G, B, E] float32
    scratch,  # [G, B, blocks, segment / CHUNK, block_e block_n] float32, used if segment > CHUNK
    batch: tl.constexpr, length: tl.constexpr, width: tl.constexpr, states: tl.constexpr, directions: tl.constexpr,
    reverse: tl.constexpr, u_shared: tl.constexpr, delta_shared: tl.constexpr, has_gap: tl.constexpr,
    has_order: tl.constexpr, reorder_parameters: tl.constexpr,
    segment: tl.constexpr,  # steps between two saved states, a multiple of CHUNK
    block_e: tl.constexpr, block_n: tl.constexpr,  # multiples of LANES_E and of CHUNK
):  # fmt: skip
    """Runs the backward, last chunk first: recomputes a chunk's states, and fetches the inputs one chunk ahead.

    One warp. Lane 8 q + r holds J channels and M states of each: tiles of the state are [32, J, M]. Of a chunk it holds
    u, delta and dout at step q, [32, J, 1], and B at step r or C at step r - 4, [32, 1, M]. So no two lanes compute the
    same value; a row reaches other lanes by a shuffle when its step comes. The states at the chunks of a segment are
    rebuilt from its saved one; each lane reads from `scratch` the tiles that it wrote.
    """
    size_e: tl.constexpr = block_e // LANES_E
    size_n: tl.constexpr = block_n // CHUNK
    tile_size: tl.constexpr = block_e * block_n
    chunks: tl.constexpr = (length + CHUNK - 1) // CHUNK
    segments: tl.constexpr = (length + segment - 1) // segment
    each: tl.constexpr = segment // CHUNK
    last: tl.constexpr = length - 1
    g, image, scan, first, sign = my_scan(batch, length, directions, reverse)
    block = tl.program_id(1)
    lane = tl.arange(0, 32)[:, None, None]
    held = held_by(lane, block, block_e, block_n, width)
    q, r, e, n, real_e = held
    j = tl.arange(0, size_e)[None, :, None]
    u += (image if u_shared else scan) * (length * width)
    delta += (image if delta_shared else scan) * (length * width)
    dout += image * (length * width)
    columns = scan * (length * states) + tl.minimum(n, states - 1)
    columns = tl.where(r < CHUNK, B + columns, C + columns)
    order += scan * length
    arrays = (u, delta, dout, columns, gap + scan * length, order, first, sign)
    du, ddelta = du + scan * (length * width), ddelta + scan * (length * width)
    part = (block * (directions * batch) + scan) * (length * states)
    dB, dC = dB + part, dC + part
    starts += scan * (segments * block_n * width)
    scratch += (scan * tl.num_programs(1) + block) * (each * tile_size)
    a = tl.load(A + (g * (width * states) + e * states + n), mask=n < states, other=0.0)
    skip, bias = tl.load(D + (g * width + e)), tl.load(delta_bias + (g * width + e))
    none, none_e = tl.zeros([32, size_e, size_n], tl.float32), tl.zeros([32, size_e, 1], tl.float32)
    dh, da, dskip, dbias, by_gap = none, none, none_e, none_e, none_e
    ahead = load_chunk(arrays, chunks - 1, held, length, width, states, has_gap, has_order, reorder_parameters)
    for number in range(segments):
        k = segments - 1 - number
        count = tl.minimum(chunks - k * each, each)  # chunks of segment k
        # The same lanes, hidden from the compiler: otherwise it keeps values derived from them, and spills registers.
        lane_k = of_lane(lane, (lane + 32 * k) % 32)
        held_k = held_by(lane_k, block, block_e, block_n, width)
        q_k, r_k, e_k, n_k, real_k = held_k
        h = tl.load(starts + (k * (block_n * width) + n_k // PART * (width * PART) + n_k % PART + e_k * PART))
        tiles = scratch + (lane_k * size_n + n_k % size_n)
        if each > 1:
            for i in range(count - 1):
                store_tile(tiles + i * tile_size, h, j)
                loaded = load_chunk(
                    arrays, k * each + i, held_k, length, width, states, has_gap, has_order, reorder_parameters
                )
                x, dt, tau, slope = time_steps(loaded, bias, q_k >= 0, has_gap)
                kept, decays = through_chunk(h, a, tau, dt * x, loaded[3], q_k, r_k)
                h = kept[CHUNK]
            store_tile(tiles + (count - 1) * tile_size, h, j)
            if size_n != PART:  # only for PART do tests check that a lane reads what it wrote itself
                tl.debug_barrier()
        for done in range(count):
            i = count - 1 - done
            c = k * each + i
            if each > 1:
                h = load_tile(tiles + i * tile_size, j)
            loaded = ahead
            ahead = load_chunk(
                arrays, tl.maximum(c - 1, 0), held, length, width, states, has_gap, has_order, reorder_parameters
            )
            inside, inside_r = c * CHUNK + q < length, c * CHUNK + r % CHUNK < length
            x, dt, tau, slope = time_steps(loaded, bias, inside, has_gap)
            dy = tl.where(inside & real_e, loaded[2].to(tl.float32), 0.0)  # makes all gradients outside 0
            drive = dt * x
            kept, decays = through_chunk(h, a, tau, drive, loaded[3], q, r)
            dh, da, dcolumns, ddrive, dtau = back_through_chunk(
                dh, da, kept, decays, a, dy, -tau, -drive, -loaded[3], lane, q, r, 2 if has_gap else 1
            )
            ddt = ddrive * x + dtau
            if has_gap:  # dt also enters the tau of the next step, which may be in the next chunk
                after = by_gap
                by_gap = loaded[4] * dtau
                ddt += of_lane(tl.where(q == 0, after, by_gap), (lane + LANES_E) % 32)
            draw = ddt * slope
            dskip += dy * x
            dbias += draw
            _, token, row = place(order, tl.minimum(c * CHUNK + q, last), first, sign, has_order, reorder_parameters)
            i_r = tl.minimum(c * CHUNK + r % CHUNK, last)
            _, _, row_r = place(order, i_r, first, sign, has_order, reorder_parameters)
            tl.store(du + (token * width + e), (ddrive * dt + skip * dy).to(du.dtype.element_ty), mask=inside & real_e)
            tl.store(ddelta + (row * width + e), draw.to(ddelta.dtype.element_ty), mask=inside & real_e)
            tl.store(dB + (row_r * states + n), dcolumns, mask=inside_r & (n < states) & (r < CHUNK))
            tl.store(dC + (row_r * states + n), dcolumns, mask=inside_r & (n < states) & (r >= CHUNK))
    q, r, e, n, real_e = held_by(of_lane(lane, lane), block, block_e, block_n, width)  # as lane_k
    for step_bit in tl.static_range(2):
        dskip += of_lane(dskip, lane ^ (LANES_E << step_bit))
        dbias += of_lane(dbias, lane ^ (LANES_E << step_bit))
    tl.store(dA + (scan * (width * states) + (e * states + n)), da, mask=real_e & (n < states))
    tl.store(dD + (scan * width + e), dskip, mask=real_e & (q == 0))
    tl.store(ddelta_bias + (scan * width + e), dbias, mask=real_e & (q == 0))


@triton.jit
def load_tile(at, j):
    """Loads `[32, J, M]` from pointers `[32, 1, M]` by j, so that a lane holds its own states in any Triton release."""
    tile = tl.broadcast_to(tl.load(at), [at.shape[0], j.shape[1], at.shape[2]])
    for i in tl.static_range(1, j.shape[1]):
        tile = tl.where(j == i, tl.load(at + i * (at.shape[0] * at.shape[2])), tile)
    return tile


@triton.jit
def store_tile(at, tile, j):
    """Stores what `load_tile` loads, one j at a time, picked by a sum of integers of which all but one are 0."""
    bits = tile.to(tl.int32, bitcast=True)
    for i in tl.static_range(j.shape[1]):
        part = tl.sum(tl.where(j == i, bits, 0), axis=1, keep_dims=True)
        tl.store(at + i * (at.shape[0] * at.shape[2]), part.to(tl.float32, bitcast=True))


@triton.jit
def held_by(lane, block, block_e: tl.constexpr, block_n: tl.constexpr, width: tl.constexpr):
    """Returns a lane's q, r, channels `[32, J, 1]` (at most the last), states `[32, 1, M]`, and a mask of channels."""
    q, r = lane // LANES_E, lane % LANES_E
    e = block * block_e + r * (block_e // LANES_E) + tl.arange(0, block_e // LANES_E)[None, :, None]
    n = q * (block_n // CHUNK) + tl.arange(0, block_n // CHUNK)[None, None, :]
    whole: tl.constexpr = width % block_e == 0
    return q, r, e if whole else tl.minimum(e, width - 1), n, r >= 0 if whole else e < width


@triton.jit
def load_chunk(
    arrays, c, held, length: tl.constexpr, width: tl.constexpr, states: tl.constexpr, has_gap: tl.constexpr,
    has_order: tl.constexpr, reorder_parameters: tl.constexpr,
):  # fmt: skip
    """Loads a lane's u, delta, dout, and B or C of chunk c; if has_gap, also the gap and the delta scanned before."""
    u, delta, dout, columns, gap, order, first, sign = arrays
    q, r, e, n, real_e = held
    i, last = c * CHUNK + q, length - 1
    step, token, row = place(order, tl.minimum(i, last), first, sign, has_order, reorder_parameters)
    _, _, row_r = place(order, tl.minimum(c * CHUNK + r % CHUNK, last), first, sign, has_order, reorder_parameters)
    small = tl.load(columns + row_r * states)
    if states < CHUNK * n.shape[2]:
        small = tl.where(n < states, small, 0.0)
    at = token * width + e
    loaded = (tl.load(u + at), tl.load(delta + (row * width + e)), tl.load(dout + at), small)
    if has_gap:
        i_before = tl.minimum(tl.maximum(i, 1), length) - 1
        _, _, row = place(order, i_before, first, sign, has_order, reorder_parameters)
        loaded += (tl.where((i > 0) & (i < length), tl.load(gap + step), 0.0), tl.load(delta + (row * width + e)))
    return loaded


@triton.jit
def time_steps(loaded, bias, inside, has_gap: tl.constexpr):
    """Returns u, dt, tau and the derivative of softplus for a loaded chunk; all but u are 0 outside of `inside`."""
    raw = tl.where(inside, loaded[1].to(tl.float32) + bias, -1e30)
    dt = softplus(raw)
    tau = dt + loaded[4] * softplus(loaded[5].to(tl.float32) + bias) if has_gap else dt
    return loaded[0].to(tl.float32), dt, tau, tl.exp2((raw - dt) * LOG2_E)  # sigmoid(raw)


@triton.jit
def through_chunk(h, a, tau, drive, columns, q, r):
    """Returns the states before each step of a chunk and after the last one, and the decay of each step."""
    kept, decays = (h,), ()
    for s in tl.static_range(CHUNK):
        decay = tl.exp2(of_lane(tau, r + s * LANES_E) * a)
        h = decay * h + of_lane(drive, r + s * LANES_E) * of_lane(columns, q * LANES_E + s)
        kept += (h,)
        decays += (decay,)
    return kept, decays


@triton.jit
def back_through_chunk(
    dh, da, kept, decays, a, dy, less_tau, less_drive, less_columns, lane, q, r, again: tl.constexpr
):  # fmt: skip
    """Returns the new dh (-g of docs/concepts/kernels.md) and da, a lane's row of dB or dC, and its ddrive and dtau.

    The arguments `less_*` are negated, so that the compiler cannot keep the copies that `through_chunk` spread over the
    lanes: there are not enough registers. For the same reason the decays of the first `again` steps are recomputed.
    """
    dBs, dCs, ddrives, dtaus = (), (), (), ()
    for s in tl.static_range(CHUNK - 1, -1, -1):
        dy_s, tau_s = of_lane(dy, r + s * LANES_E), of_lane(less_tau, r + s * LANES_E)
        dh += dy_s * of_lane(less_columns, q * LANES_E + (CHUNK + s))
        dCs = (tl.sum(kept[s + 1] * dy_s, axis=1, keep_dims=True),) + dCs
        dBs = (tl.sum(dh * of_lane(less_drive, r + s * LANES_E), axis=1, keep_dims=True),) + dBs
        ddrives = (tl.sum(dh * of_lane(less_columns, q * LANES_E + s), axis=2, keep_dims=True),) + ddrives
        dh *= decays[s] if s >= again else tl.exp2(-tau_s * a)
        dexponent = dh * kept[s]
        dtaus = (tl.sum(dexponent * a, axis=2, keep_dims=True),) + dtaus
        da += dexponent * tau_s
    dcolumns = halve(halve(halve(dBs + dCs, lane, 1), lane, 2), lane, 4)
    ddrive, dtau = halve(halve(ddrives, lane, 8), lane, 16), halve(halve(dtaus, lane, 8), lane, 16)
    return dh, da, dcolumns[0], ddrive[0], dtau[0] * -LN_2  # a is log2(e) A


@triton.jit
def halve(tiles, lane, bit: tl.constexpr):
    """Sums over pairs of lanes: those with the bit get the sum of the second of two tiles, the others of the first."""
    second, sums = (lane & bit) != 0, ()
    for i in tl.static_range(len(tiles) // 2):
        given = tl.where(second, tiles[2 * i], tiles[2 * i + 1])
        sums += (tl.where(second, tiles[2 * i + 1], tiles[2 * i]) + of_lane(given, lane ^ bit),)
    return sums


@triton.jit
def of_lane(tile, lane):
    """Returns what the given lanes hold: a shuffle, if Triton lays the first axis out over the warp, its default."""
    return tl.gather(tile, tl.broadcast_to(lane, tile.shape), 0)


@triton.jit
def my_scan(batch: tl.constexpr, length: tl.constexpr, directions: tl.constexpr, reverse: tl.constexpr):
    """Returns the program's direction, image, row in arrays with a row per scan, first step, and sign of the next.

    Directions are the fastest axis, so that the arrays they share are still in the cache.
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
    """Returns (step, token, row) of index i, as the module docstring defines them; `order` is that of its scan."""
    step = first + sign * i
    token = tl.load(order + step) if has_order else step
    row = token if reorder_parameters else step
    return step, token, row


@triton.jit
def channels_of(
    x, scan, block, length: tl.constexpr, width: tl.constexpr, lanes: tl.constexpr, pair: tl.constexpr,
    packed: tl.constexpr,
):  # fmt: skip
    """Returns pointers to a program's channels in the first row of a scan; those past the last channel point to it.

    With `packed`, an int32 holds two bfloat16 values, which takes half the registers.
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
    """Returns float32 values `[lanes]` for each of a thread's channels, from what `channels_of` points to."""
    if packed:
        return (raw << 16).to(tl.float32, bitcast=True), (raw & -65536).to(tl.float32, bitcast=True)
    elif pair == 2:
        even, odd = tl.split(tl.reshape(raw, [lanes, 2]))
        return even.to(tl.float32), odd.to(tl.float32)
    else:
        return (raw.to(tl.float32),)


@triton.jit
def part_of(row, k: tl.constexpr, n, states: tl.constexpr):
    """Loads part k of a row of states, `[lanes, 4]`, with zeros past the last state."""
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
            tl.store(at, h[k * pair + p], mask=None if width % (lanes * pair) == 0 else (e < width)[:, None])


@triton.jit
def softplus(x):
    """Computes log(1 + exp(x)) to float32 accuracy, without a division: max(x, 0) + log(1 + t) with 0 <= t <= 1.

    log(1 + t) is t times a minimax polynomial of log(1 + t) / t, with a relative error of 2e-7.
    """
    t = tl.exp2(-tl.abs(x) * LOG2_E)
    p = (0.005253457796 * t - 0.02958850739) * t + 0.07836166801
    p = ((p * t - 0.136747697) * t + 0.1911143108) * t - 0.2484436989
    return tl.maximum(x, 0.0) + (((p * t + 0.3331927134) * t - 0.4999950152) * t + 0.9999999705) * t
