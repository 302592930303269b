"""Attention of the tokens of a step: queries of a few tokens at a time, over a stretch of pages at a time.

A stretch gives a softmax of its own, and a row puts those of its stretches together as it goes (online
softmax; Milakov and Gimelshein, 2018; the blocks are those of flash attention, Dao et al., 2022). What a page
holds beyond a token's own position changes nothing, to the last bit: a token's result does not depend on who
shares its block.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.gemm import PARTS, multiply_paged, x_item
from engine.backends.cpu.jit import part
from engine.backends.cpu.paged_tile import ADDRESS, PART
from engine.backends.cpu.simd import ITEM, LANES
from engine.backends.cpu.threads import fetch_add
from engine.backends.cpu.vector_math import (
    BFLOAT16_ITEM,
    FAST_MATH,
    address,
    exp,
    exp_minus_max_sum,
    inverse_rms,
    narrow,
    rescale,
    soft_cap,
    stored,
    vector_max,
)

STRETCH = 128  # positions, in whole pages, that a softmax looks at together
QUERIES = 48  # rows that go through a page together, at most, where a group has no more heads
ROPE_BLOCK, MIN_ROPE_BLOCKED = 8, 64  # tokens that a thread rotates at a time, in steps of more than so many


class Heads(NamedTuple):
    """Room for the heads that S threads are at: R queries, and A addresses of parts of a stretch's keys, and
    of its values; of this stretch and of the next."""

    keys_S2A: np.ndarray
    values_S2A: np.ndarray
    queries_SRD: np.ndarray
    scores_SRP: np.ndarray
    mixed_SRD: np.ndarray
    peaks_SR: np.ndarray
    totals_SR: np.ndarray


@part()
def apply_rope(work, qkv_TN, shape, head_norm_QD, plan, cos_TE, sin_TE, keys_XKDPI, values_XKBPVI):
    """Norm and rotate queries and keys in place, and write keys and values into their pages."""
    rows, heads, kv_heads, size = len(plan.ids_T), shape.heads, shape.kv_heads, shape.head_dim
    group, at_once = heads // kv_heads, ROPE_BLOCK if rows > MIN_ROPE_BLOCKED else 1
    together = kv_heads if shape.whole_norm else 1  # a norm of all the width is of what is not rotated yet
    parts, steps = kv_heads // together, keys_XKDPI.shape[4]
    units = (rows + at_once - 1) // at_once * parts
    unit, span = fetch_add(work), 0
    q_scale = k_scale = np.float32(1.0)
    while unit < units:
        block, first = unit // parts, unit % parts * together
        for t in range(block * at_once, min(rows, (block + 1) * at_once)):
            if shape.whole_norm:
                q_scale = inverse_rms(qkv_TN, t, np.int64(0), heads * size, shape.head_eps)
                k_scale = inverse_rms(qkv_TN, t, heads * size, kv_heads * size, shape.head_eps)
            while plan.begin_J[span] > t:
                span -= 1
            while plan.begin_J[span + 1] <= t:
                span += 1
            position = plan.computed_J[span] + t - plan.begin_J[span]
            page, at = plan.pages[plan.table_J[span] + position // shape.page], position % shape.page
            for kv_head in range(first, first + together):
                for g in range(group + 1):
                    head = kv_head * group + g if g < group else heads + kv_head
                    scale = q_scale if g < group else k_scale
                    _norm_and_rotate(qkv_TN, t, head, shape, head_norm_QD, scale, cos_TE, sin_TE)
                key, value = (heads + kv_head) * size, (heads + kv_heads + kv_head) * size
                for i in range(steps):
                    for d in range(size // steps):
                        keys_XKDPI[page, kv_head, d, at, i] = stored(
                            qkv_TN[t, np.uintp(key + d * steps + i)], keys_XKDPI
                        )
                for d in range(size):
                    values_XKBPVI[page, kv_head, d // PART, at // steps, d % PART, at % steps] = stored(
                        qkv_TN[t, np.uintp(value + d)], values_XKBPVI
                    )
        unit = fetch_add(work)


@part(fastmath=FAST_MATH)
def _norm_and_rotate(qkv_TN, t, head, shape, head_norm_QD, scale, cos_TE, sin_TE):
    """Rotate a head, after its norm: dimensions i and i + E are a point of a plane.

    `scale` is what the norm of all heads together multiplies by; one of each head by itself has its own.
    """
    size, half, begin = shape.head_dim, shape.head_dim // 2, head * shape.head_dim
    if len(head_norm_QD):
        if not shape.whole_norm:
            scale = inverse_rms(qkv_TN, t, begin, size, shape.head_eps)
        for d in range(size):
            qkv_TN[t, begin + d] *= scale * head_norm_QD[head, d]
    for e in range(half):
        a, b = qkv_TN[t, begin + e], qkv_TN[t, begin + half + e]
        qkv_TN[t, begin + e] = a * cos_TE[t, e] - b * sin_TE[t, e]
        qkv_TN[t, begin + half + e] = b * cos_TE[t, e] + a * sin_TE[t, e]


@part()
def attend(
    work, qkv_TN, shape, plan, window, softcap, keys_XKDPI, values_XKBPVI, mixed_TN, thread, space
):  # fmt: skip
    """Mix the values of each token's context, its own included."""
    group, kv_heads = shape.heads // shape.kv_heads, shape.kv_heads
    at_once, spans = max(1, QUERIES // group), len(plan.begin_J) - 1
    unit, span, before = fetch_add(work), 0, 0  # units of the spans before this one
    while span < spans:
        begin, end = plan.begin_J[span], plan.begin_J[span + 1]
        units = (end - begin + at_once - 1) // at_once * kv_heads
        if unit >= before + units:
            before += units
            span += 1
            continue
        first = begin + (unit - before) // kv_heads * at_once
        _block(
            qkv_TN, first, min(at_once, end - first), group, (unit - before) % kv_heads,
            plan.computed_J[span] + first - begin, plan.pages, plan.table_J[span], shape, window,
            softcap, keys_XKDPI, values_XKBPVI, mixed_TN, space.keys_S2A[thread], space.values_S2A[thread],
            space.queries_SRD[thread], space.scores_SRP[thread], space.mixed_SRD[thread],
            space.peaks_SR[thread], space.totals_SR[thread],
        )  # fmt: skip
        unit = fetch_add(work)


@part()
def _write_addresses(
    pages, first, last, filled, keys, key_page, values, value_page, value_part, keys_A, values_A
):  # fmt: skip
    """Write the addresses of parts of keys and values in pages `first` on, the last one's in place of any
    after it."""
    parts = filled // PART
    for i in range(len(keys_A)):
        page = pages[min(first + i // parts, last)]
        keys_A[i] = keys + page * key_page + i % parts * PART * ITEM
    for i in range(len(values_A)):
        page = pages[min(first + i // PARTS, last)]
        values_A[i] = values + page * value_page + i % PARTS * value_part


@part()
def _block(
    qkv_TN, first, count, group, kv_head, position, pages, table, shape, window, softcap, keys_XKDPI,
    values_XKBPVI, mixed_TN, keys_2A, values_2A, q_RD, scores_RP, mixed_RD, peak_R, total_R,
):  # fmt: skip
    """Tokens first, first + 1, ..., at `position` and after it, with the heads of one group."""
    size, rows = shape.head_dim, count * group
    filled = (shape.page + PART - 1) // PART * PART  # scores of a page; those behind it do not count
    # of a position the numbers that lie together, one float32 or two bfloat16, take ITEM bytes
    item, positions = keys_XKDPI.itemsize, values_XKBPVI.shape[3] * values_XKBPVI.shape[5]
    by = x_item(keys_XKDPI.dtype)  # bytes of a number that they are multiplied by
    key_row, value_row, value_part = keys_XKDPI.shape[3] * item, PART * item, positions * PART * item
    # a literal has a type of its own, for which functions would be compiled again
    no, yes = np.int64(0), np.int64(1)
    row, mixed_row, at_once = scores_RP.shape[1] * ITEM, mixed_RD.shape[1] * ITEM, values_2A.shape[1] // PARTS
    key_bytes, value_bytes = size * key_row, values_XKBPVI.shape[2] * value_part  # of a head in a page
    key_page, value_page = shape.kv_heads * key_bytes, shape.kv_heads * value_bytes
    keys, values = address(keys_XKDPI) + kv_head * key_bytes, address(values_XKBPVI) + kv_head * value_bytes
    scores, mixed = address(scores_RP), address(mixed_RD)
    for t in range(count):
        for g in range(group):
            at, r = (kv_head * group + g) * size, t * group + g
            peak_R[r], total_R[r] = -np.inf, 0
            for d in range(size):
                q_RD[r, d], mixed_RD[r, d] = qkv_TN[first + t, at + d], 0
            if by == BFLOAT16_ITEM:
                narrow(address(q_RD[r]), address(q_RD[r]), size)
    last = (position + count - 1) // shape.page
    begin = max(0, position + 1 - window) // shape.page // at_once * at_once if window else 0
    here, there, end_of_pages = 0, 1, table + last
    _write_addresses(
        pages, table + begin, end_of_pages, filled, keys, key_page, values, value_page, value_part,
        keys_2A[here], values_2A[here],
    )  # fmt: skip
    while begin <= last:
        end = min(begin + at_once, last + 1)
        following = there if end <= last else here
        if end <= last:
            _write_addresses(
                pages, table + end, end_of_pages, filled, keys, key_page, values, value_page, value_part,
                keys_2A[following], values_2A[following],
            )  # fmt: skip
        for p in range(0, (end - begin) * filled // PART, PARTS):
            multiply_paged(
                rows, keys_XKDPI.dtype, address(q_RD), size * ITEM, no, address(keys_2A[here]) + p * ADDRESS,
                no, yes, key_row, size, scores + p * PART * ITEM, row, no,
                address(keys_2A[following]) + p * ADDRESS,
            )  # fmt: skip
        for r in range(rows):
            own = position + r // group
            _softmax(
                scores_RP, r, begin, end, filled, shape.page, own, window, softcap, peak_R, total_R, mixed_RD,
                by,
            )  # fmt: skip
        for b in range(0, values_XKBPVI.shape[2], PARTS):
            multiply_paged(
                rows, values_XKBPVI.dtype, scores, row, filled * by, address(values_2A[here]), b * value_part,
                end - begin, value_row, positions, mixed + b * PART * ITEM, mixed_row, yes,
                address(values_2A[following]),
            )  # fmt: skip
        begin, here, there = end, there, here
    for t in range(count):
        for g in range(group):
            at, r = (kv_head * group + g) * size, t * group + g
            share = np.float32(1.0) / total_R[r]
            for d in range(size):
                mixed_TN[first + t, at + d] = mixed_RD[r, d] * share


@part()
def _softmax(
    scores_RP, r, first, end, filled, page_size, own, window, softcap, peak_R, total_R, mixed_RD, by
):  # fmt: skip
    """Turn a row's scores of pages first to end into weights, `by` bytes each, 0 where it does not look; keep
    up what came before."""
    size, mixed = (end - first) * filled, address(mixed_RD[r])
    scores = address(scores_RP[r])
    behind = scores + size * ITEM
    if softcap > 0:
        for p in range(0, size, LANES):
            soft_cap(scores + p * ITEM, softcap)
    if window or filled > page_size or own + 1 < end * page_size:
        for page in range(first, end):  # beyond its own position, before its window, or behind the page
            at, hidden = (page - first) * filled, own - window + 1 - page * page_size if window else 0
            for p in range(at, at + min(max(hidden, 0), filled)):
                scores_RP[r, p] = -np.inf
            for p in range(at + max(0, min(own + 1 - page * page_size, page_size)), at + filled):
                scores_RP[r, p] = -np.inf
    most = vector_max(scores, behind)
    peak = most if most > peak_R[r] else peak_R[r]
    if peak == -np.inf:  # not one of them so far
        for p in range(size):
            scores_RP[r, p] = 0
        return
    if peak > peak_R[r]:
        kept = exp(peak_R[r] - peak)
        peak_R[r] = peak
        total_R[r] *= kept
        rescale(mixed, mixed + mixed_RD.shape[1] * ITEM, kept)
    total_R[r] += exp_minus_max_sum(scores, behind, peak)
    if by == BFLOAT16_ITEM:
        narrow(scores, scores, size)
