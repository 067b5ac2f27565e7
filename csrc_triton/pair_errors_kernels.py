"""The kernels of `pair_errors.py`, where the equations are.

How one launch suffices for the forward: each program sums BLOCK elements of one pair and writes its partial sums; the
program that draws the last ticket (an integer atomic; floats are never added atomically) adds the partials of each pair
in a fixed order and finishes the pairs. A pair's result depends neither on its place in the batch nor on the batch
size.
"""

from dataclasses import replace

from csrc_triton.language import tl, triton
from csrc_triton.latents import element_offsets
from csrc_triton.philox import Stream, normal_span
from csrc_triton.specimen import Specimen

BLOCK = 2048  # elements of one sample per program: one 16-byte vector of a half dtype per thread and tensor
PAIR_TILE = 256  # partial sums per row of sums that the last program adds at a time
WARPS = 8
REGISTERS = {
    2: 80,
    4: 96,
}  # of the forward, by bytes of an element: left to itself the compiler aims at 64 or 40 and spills a few
NOISE = tl.constexpr(int(Stream.NOISE))


@triton.jit
def _targets(
    target_ptr, latents_ptr, of_noise_ptr, of_data_ptr, keys_ptr, draws_ptr, seed_ptr,
    pair, batch, timestep, first, mask, channels, pixels, elements,
    SHARED: tl.constexpr, TARGET_LAST: tl.constexpr, LATENTS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The targets fp32 [BLOCK] of the win and the lose half: read, or made from the regenerated noise of the pair."""
    element = first + tl.arange(0, BLOCK)
    win_start, lose_start = pair.to(tl.int64) * elements, (pair + batch).to(tl.int64) * elements
    if target_ptr is not None:
        offset = element_offsets(element, channels, pixels, TARGET_LAST)
        win = tl.load(target_ptr + win_start + offset, mask=mask, other=0.0).to(tl.float32)
        lose = win
        if not SHARED:
            lose = tl.load(target_ptr + lose_start + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        win = normal_span(
            first // 4, tl.load(keys_ptr + pair), tl.load(draws_ptr + pair), tl.load(seed_ptr), NOISE, BLOCK
        )
        lose = win
        if latents_ptr is not None:
            noise = tl.load(of_noise_ptr + timestep) * win
            of_data = tl.load(of_data_ptr + timestep)
            offset = element_offsets(element, channels, pixels, LATENTS_LAST)
            win = noise + of_data * tl.load(latents_ptr + win_start + offset, mask=mask, other=0.0).to(tl.float32)
            lose = noise + of_data * tl.load(latents_ptr + lose_start + offset, mask=mask, other=0.0).to(tl.float32)
    return win, lose


@triton.jit
def _sum(x, mask, BLOCK: tl.constexpr):
    """fp32 [BLOCK] -> float64: neighbours in fours in fp32, the rest in float64, so that the error is that of one fp32
    rounding.
    """
    fours = tl.sum(tl.reshape(tl.where(mask, x, 0.0), (BLOCK // 4, 4)), axis=1)
    return tl.sum(fours.to(tl.float64))


@triton.jit
def _mean_of_partials(address, mask, share):
    """fp32 [PAIRS] from the float64 partial sums at `address` [PAIRS, SPLITS]; .cg, since other programs wrote them."""
    return (tl.sum(tl.load(address, mask=mask, other=0.0, cache_modifier=".cg"), axis=1) * share).to(tl.float32)


@triton.jit
def _finish_pairs(
    partials_ptr, recorded_ptr, timesteps_ptr, prob_ptr, usable_ptr, weight_ptr, correction_ptr, beta_ptr,
    logit_ptr, difference_ptr, errors_ptr, gain_ptr, product_ptr, pair, batch, splits, count,
    REFERENCE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Errors, difference, logit, gain and product of the pairs `pair` [PAIRS] from their partial sums, added in a fixed order."""
    inside = pair < batch
    split = tl.arange(0, SPLITS)[None, :]
    address = partials_ptr + pair[:, None] * splits + split
    partial = inside[:, None] & (split < splits)
    stride = batch * splits
    share = 1.0 / tl.full((1,), count, tl.float64)
    policy_win = _mean_of_partials(address, partial, share)
    policy_lose = _mean_of_partials(address + stride, partial, share)
    product = _mean_of_partials(address + 5 * stride, partial, share)
    zero = policy_win * 0.0
    reference_win, reference_lose, d, z, gain = zero, zero, zero, zero, zero
    if REFERENCE:
        reference_win = _mean_of_partials(address + 2 * stride, partial, share)
        reference_lose = _mean_of_partials(address + 3 * stride, partial, share)
        d = _mean_of_partials(address + 4 * stride, partial, share)
    if recorded_ptr is not None:
        reference_win = tl.load(recorded_ptr + pair, mask=inside, other=0.0)
        reference_lose = tl.load(recorded_ptr + batch + pair, mask=inside, other=0.0)
        d = (policy_win - reference_win) - (policy_lose - reference_lose)

    live = tl.load(usable_ptr + pair, mask=inside, other=0.0) > 0.0
    if REFERENCE or recorded_ptr is not None:
        timestep = tl.load(timesteps_ptr + pair, mask=live, other=0)
        p = tl.load(prob_ptr + pair, mask=live, other=0.5)
        weight = tl.load(weight_ptr + timestep)
        correction = tl.where(p == 0.5, 0.0, tl.load(correction_ptr + timestep))
        half_beta = 0.5 * tl.load(beta_ptr)
        z = -half_beta * (weight * d + correction)
        gain = -half_beta * weight

    tl.store(logit_ptr + pair, tl.where(live, z, 0.0), mask=inside)
    tl.store(difference_ptr + pair, tl.where(live, d, 0.0), mask=inside)
    tl.store(gain_ptr + pair, tl.where(live, gain, 0.0), mask=inside)
    tl.store(product_ptr + pair, tl.where(live, product, 0.0), mask=inside)
    rows = (policy_win, policy_lose, reference_win, reference_lose)
    for row in tl.static_range(4):
        tl.store(errors_ptr + row * batch + pair, tl.where(live, rows[row], 0.0), mask=inside)


@triton.jit
def _write_tables(timesteps_ptr, prob_ptr, usable_ptr, difference_ptr, tables_ptr, batch, length, CHUNK: tl.constexpr):
    """Sum of d and count per timestep [2, T]: zeros, then every pair writes the sum over all pairs that share its
    timestep.

    Pairs with one timestep write the same bits. Summed in float64, so that the order of the pairs does not show in
    fp32.
    """
    for first in range(0, length, 1024):
        entry = first + tl.arange(0, 1024)
        tl.store(tables_ptr + entry, tl.zeros((1024,), tl.float32), mask=entry < length)
        tl.store(tables_ptr + length + entry, tl.zeros((1024,), tl.float32), mask=entry < length)
    tl.debug_barrier()  # zeros before sums; the differences, written by other threads of this program, before they are read
    for first in range(0, batch, CHUNK):
        mine = first + tl.arange(0, CHUNK)
        in_mine = mine < batch
        counted = (tl.load(usable_ptr + mine, mask=in_mine, other=0.0) > 0.0) & (
            tl.load(prob_ptr + mine, mask=in_mine, other=0.5) > 0.5
        )
        my_timestep = tl.load(timesteps_ptr + mine, mask=counted, other=0)
        total, number = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float32)
        for other_first in range(0, batch, CHUNK):
            other = other_first + tl.arange(0, CHUNK)
            in_other = other < batch
            usable = tl.load(usable_ptr + other, mask=in_other, other=0.0) > 0.0
            usable = usable & (tl.load(prob_ptr + other, mask=in_other, other=0.5) > 0.5)
            timestep = tl.load(timesteps_ptr + other, mask=usable, other=-1)
            difference = tl.load(difference_ptr + other, mask=usable, other=0.0).to(tl.float64)
            same = my_timestep[:, None] == timestep[None, :]
            total += tl.sum(tl.where(same, difference[None, :], 0.0), axis=1)
            number += tl.sum(tl.where(same, 1.0, 0.0), axis=1)
        tl.store(tables_ptr + my_timestep, total.to(tl.float32), mask=counted)
        tl.store(tables_ptr + length + my_timestep, number, mask=counted)


@triton.jit
def pair_errors_kernel(
    policy_ptr,  # [2B, C, H, W]
    reference_ptr,  # [2B, C, H, W] or None
    recorded_ptr,  # [2, B] fp32 or None
    target_ptr,  # [B or 2B, C, H, W] or None
    latents_ptr,  # [2B, C, H, W] or None
    of_noise_ptr,  # [T] fp32 or None
    of_data_ptr,  # [T] fp32 or None
    keys_ptr,  # [B] int64 or None
    draws_ptr,  # [B] int64 or None
    seed_ptr,  # [] int64 or None
    timesteps_ptr,  # [B] int64
    prob_ptr,  # [B] fp32
    usable_ptr,  # [B] fp32
    weight_ptr,  # [T] fp32
    correction_ptr,  # [T] fp32
    beta_ptr,  # [] fp32
    partials_ptr,  # [6, B, splits] fp64 workspace
    ticket_ptr,  # [1] int32, zero
    logit_ptr,  # [B] fp32
    difference_ptr,  # [B] fp32
    errors_ptr,  # [4, B] fp32: policy win, policy lose, reference win, reference lose
    gain_ptr,  # [B] fp32: d logit / d difference
    product_ptr,  # [B] fp32: mean of the win residual times the lose residual
    tables_ptr,  # [2, T] fp32: sum of d, count
    batch,  # B
    channels,
    pixels,  # H W
    elements,  # C H W
    count,  # C H W as fp32
    length,  # T
    SHARED: tl.constexpr,
    POLICY_LAST: tl.constexpr,
    REFERENCE_LAST: tl.constexpr,
    TARGET_LAST: tl.constexpr,
    LATENTS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    REFERENCE: tl.constexpr = reference_ptr is not None
    part, pair = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    first = part * BLOCK
    element = first + tl.arange(0, BLOCK)
    live = tl.load(usable_ptr + pair) > 0.0
    mask = element < tl.where(live, elements, 0)  # of a hole nothing is read: whatever it holds cannot spread
    timestep = tl.load(timesteps_ptr + pair, mask=live, other=0)
    target_win, target_lose = _targets(
        target_ptr, latents_ptr, of_noise_ptr, of_data_ptr, keys_ptr, draws_ptr, seed_ptr,
        pair, batch, timestep, first, mask, channels, pixels, elements, SHARED, TARGET_LAST, LATENTS_LAST, BLOCK,
    )  # fmt: skip
    win_start, lose_start = pair.to(tl.int64) * elements, (pair + batch).to(tl.int64) * elements
    offset = element_offsets(element, channels, pixels, POLICY_LAST)
    win = tl.load(policy_ptr + win_start + offset, mask=mask, other=0.0).to(tl.float32)
    lose = tl.load(policy_ptr + lose_start + offset, mask=mask, other=0.0).to(tl.float32)
    place = partials_ptr + pair * splits + part
    stride = batch * splits
    error_win, error_lose = win - target_win, lose - target_lose
    tl.store(place, _sum(error_win * error_win, mask, BLOCK))
    tl.store(place + stride, _sum(error_lose * error_lose, mask, BLOCK))
    tl.store(place + 5 * stride, _sum(error_win * error_lose, mask, BLOCK))
    if REFERENCE:
        offset = element_offsets(element, channels, pixels, REFERENCE_LAST)
        frozen_win = tl.load(reference_ptr + win_start + offset, mask=mask, other=0.0).to(tl.float32)
        frozen_lose = tl.load(reference_ptr + lose_start + offset, mask=mask, other=0.0).to(tl.float32)
        frozen_error_win, frozen_error_lose = frozen_win - target_win, frozen_lose - target_lose
        tl.store(place + 2 * stride, _sum(frozen_error_win * frozen_error_win, mask, BLOCK))
        tl.store(place + 3 * stride, _sum(frozen_error_lose * frozen_error_lose, mask, BLOCK))
        # (p - r)(p + r - 2 y) = (p - r)((p - y) + (r - y))
        change = (win - frozen_win) * (error_win + frozen_error_win) - (lose - frozen_lose) * (
            error_lose + frozen_error_lose
        )
        tl.store(place + 4 * stride, _sum(change, mask, BLOCK))

    tl.debug_barrier()  # every thread's partial sums are written before this program's ticket is drawn
    arrived = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == splits * tl.num_programs(1) - 1:
        for first_pair in range(0, batch, PAIRS):
            _finish_pairs(
                partials_ptr, recorded_ptr, timesteps_ptr, prob_ptr, usable_ptr, weight_ptr, correction_ptr, beta_ptr,
                logit_ptr, difference_ptr, errors_ptr, gain_ptr, product_ptr, first_pair + tl.arange(0, PAIRS), batch, splits,
                count, REFERENCE, SPLITS,
            )  # fmt: skip
        _write_tables(timesteps_ptr, prob_ptr, usable_ptr, difference_ptr, tables_ptr, batch, length, 32)


@triton.jit
def pair_errors_backward_kernel(
    slopes_ptr,  # [2, B] fp32: d loss / d (policy win error), d loss / d (policy lose error)
    policy_ptr,  # [2B, C, H, W]
    target_ptr,  # the rest as in the forward
    latents_ptr,
    of_noise_ptr,
    of_data_ptr,
    keys_ptr,
    draws_ptr,
    seed_ptr,
    timesteps_ptr,
    usable_ptr,
    out_ptr,  # [2B, C, H, W], in the memory format of the policy
    batch,
    channels,
    pixels,
    elements,
    count,
    SHARED: tl.constexpr,
    POLICY_LAST: tl.constexpr,
    TARGET_LAST: tl.constexpr,
    LATENTS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, pair = tl.program_id(0) * BLOCK, tl.program_id(1)
    element = first + tl.arange(0, BLOCK)
    inside = element < elements
    live = tl.load(usable_ptr + pair) > 0.0
    mask = element < tl.where(live, elements, 0)
    timestep = tl.load(timesteps_ptr + pair, mask=live, other=0)
    target_win, target_lose = _targets(
        target_ptr, latents_ptr, of_noise_ptr, of_data_ptr, keys_ptr, draws_ptr, seed_ptr,
        pair, batch, timestep, first, mask, channels, pixels, elements, SHARED, TARGET_LAST, LATENTS_LAST, BLOCK,
    )  # fmt: skip
    scale_win = tl.where(live, tl.div_rn(2.0 * tl.load(slopes_ptr + pair), count), 0.0)
    scale_lose = tl.where(live, tl.div_rn(2.0 * tl.load(slopes_ptr + batch + pair), count), 0.0)
    offset = element_offsets(element, channels, pixels, POLICY_LAST)
    win_offset = pair.to(tl.int64) * elements + offset
    lose_offset = (pair + batch).to(tl.int64) * elements + offset
    win = tl.load(policy_ptr + win_offset, mask=mask, other=0.0).to(tl.float32)
    lose = tl.load(policy_ptr + lose_offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + win_offset, scale_win * (win - target_win), mask=inside)
    tl.store(out_ptr + lose_offset, scale_lose * (lose - target_lose), mask=inside)


def _specimens() -> list[Specimen]:
    """Forward and backward for each way to get the target, the forward with live and with recorded references, per
    dtype.
    """
    absent = {
        "target": ("latents_ptr", "of_noise_ptr", "of_data_ptr", "keys_ptr", "draws_ptr", "seed_ptr"),
        "noise": ("target_ptr", "latents_ptr", "of_noise_ptr", "of_data_ptr"),
        "noise_and_data": ("target_ptr",),
    }
    common = dict.fromkeys(("target_ptr", "latents_ptr", "of_noise_ptr", "of_data_ptr", "usable_ptr"), "*fp32")
    common |= dict.fromkeys(("keys_ptr", "draws_ptr", "seed_ptr", "timesteps_ptr"), "*i64")
    common |= dict.fromkeys(("batch", "channels", "pixels", "elements"), "i32") | {"count": "fp32"}
    floats = (
        "recorded_ptr", "prob_ptr", "weight_ptr", "correction_ptr", "beta_ptr",
        "logit_ptr", "difference_ptr", "errors_ptr", "gain_ptr", "product_ptr", "tables_ptr",
    )  # fmt: skip
    forward = common | dict.fromkeys(floats, "*fp32") | {"partials_ptr": "*fp64", "ticket_ptr": "*i32", "length": "i32"}
    backward = common | {"slopes_ptr": "*fp32"}
    flags = dict.fromkeys(("SHARED", "POLICY_LAST", "TARGET_LAST", "LATENTS_LAST"), False) | {"BLOCK": BLOCK}
    finish = {"REFERENCE_LAST": False, "PAIRS": PAIR_TILE // 32, "SPLITS": 32}

    def specimen(name: str, kernel, dtype: str, arguments: dict, constants: dict, missing: tuple[str, ...]) -> Specimen:
        signature = {key: kind for key, kind in arguments.items() if key not in missing}
        return Specimen(
            name, kernel, dtype, signature, constants | dict.fromkeys(missing), WARPS, aligned=("elements", "pixels")
        )

    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        predictions = {"policy_ptr": f"*{dtype}", "reference_ptr": f"*{dtype}"}
        for source, missing in absent.items():
            for kind, other in (("live", "recorded_ptr"), ("recorded", "reference_ptr")):
                name, missed = f"pair_errors/{source}/{kind}", (*missing, other)
                one = specimen(name, pair_errors_kernel, dtype, forward | predictions, flags | finish, missed)
                found.append(replace(one, vector_store=False, maxnreg=REGISTERS[4 if dtype == "fp32" else 2]))
            name, arguments = (
                f"pair_errors_backward/{source}",
                backward | {"policy_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
            )
            found.append(specimen(name, pair_errors_backward_kernel, dtype, arguments, flags, missing))
    return found


AOT_SPECIMENS = _specimens()
