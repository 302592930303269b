"""Attention of the tokens of a step: queries of a few tokens at a time, over a stretch of pages at a time.

A stretch gives a softmax of its own, and a row puts those of its stretches together as it goes (online
softmax; Milakov and Gimelshein, 2018; the blocks are those of flash attention, Dao et al., 2022). What a page
holds beyond a token's own position changes nothing, to the last bit: a token's result does not depend on who
shares its block.

Keys and values come from memory, and are asked for while the stretch before them is computed, which may be
another request's.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.gemm import PARTS, multiply_paged, x_item
from engine.backends.cpu.jit import part
from engine.backends.cpu.paged_tile import ADDRESS, PART
from engine.backends.cpu.rope import prefetch_heads, rotate_token, rotated_by_attention
from engine.backends.cpu.simd import ITEM, LANES
from engine.backends.cpu.threads import fetch_add
from engine.backends.cpu.vector_math import (
    BFLOAT16_ITEM,
    address,
    exp,
    exp_minus_max_sum,
    exp_minus_max_sum_narrow,
    narrow,
    rescale,
    soft_cap,
    vector_max,
)

STRETCH = 128  # positions, in whole pages, that a softmax looks at together
QUERIES = 48  # rows that go through a page together, at most, where a group has no more heads


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


class Unit(NamedTuple):
    """A unit of work: tokens of a span, with the heads of one group."""

    span: np.int64
    first: np.int64  # of the tokens
    tokens: np.int64  # 0 where there is no such unit
    kv_head: np.int64
    position: np.int64  # of the first token
    first_page: np.int64  # of those that it looks at, counted in its request's
    last_page: np.int64


@part()
def _find(number, span, before, pages_at_once, window, shape, plan):
    """Return the unit of a number, and how many units there are before its span.

    Args:
        span, before: a span that is not behind the unit's, and the units before it.
    """
    kv_heads, spans = shape.kv_heads, len(plan.begin_J) - 1
    at_once = max(1, QUERIES // (shape.heads // kv_heads))
    while span < spans:
        begin, end = plan.begin_J[span], plan.begin_J[span + 1]
        units = (end - begin + at_once - 1) // at_once * kv_heads
        if number < before + units:
            first = begin + (number - before) // kv_heads * at_once
            tokens, position = min(at_once, end - first), plan.computed_J[span] + first - begin
            kv_head, last_page = (number - before) % kv_heads, (position + tokens - 1) // shape.page
            first_page = np.int64(0)
            if window:
                first_page = max(0, position + 1 - window) // shape.page // pages_at_once * pages_at_once
            return Unit(span, first, tokens, kv_head, position, first_page, last_page), before
        before += units
        span += 1
    none = np.int64(0)
    return Unit(span, none, none, none, none, none, none), before


@part()
def attend(work, qkv_TN, shape, plan, layer, mixed_TN, thread, threads, space):
    """Mix the values of each token's context, its own included.

    A thread begins with the unit of its own number, and claims its next one before it computes one, whose
    keys and values it prefetches meanwhile.
    """
    pages_at_once = space.values_S2A.shape[2] // PARTS
    unit, before = _find(thread, np.int64(0), np.int64(0), pages_at_once, layer.window, shape, plan)
    slot = np.int64(0)  # of the addresses of the stretch that is computed
    if unit.tokens:
        _write_addresses(unit, unit.first_page, slot, shape, plan, layer, thread, space)
    while unit.tokens:
        number = threads + fetch_add(work)
        following, before = _find(number, unit.span, before, pages_at_once, layer.window, shape, plan)
        for t in range(following.first, following.first + following.tokens):
            prefetch_heads(address(qkv_TN[t]), following.kv_head, shape)
        slot = _attend_unit(unit, following, slot, qkv_TN, shape, plan, layer, mixed_TN, thread, space)
        unit = following


@part()
def _write_addresses(unit, first, slot, shape, plan, layer, thread, space):
    """Write the addresses of parts of keys and values in a unit's pages `first` on, the last one's in place
    of any after it."""
    keys_XKDPI, values_XKBPVI = layer.keys_XKDPI, layer.values_XKBPVI
    keys_A, values_A = space.keys_S2A[thread, slot], space.values_S2A[thread, slot]
    parts, pages = (shape.page + PART - 1) // PART, len(values_A) // PARTS
    value_part = values_XKBPVI.shape[3] * PART * ITEM
    table = plan.table_J[unit.span]
    for index in range(pages):
        page = plan.pages[table + min(first + index, unit.last_page)]
        key, value = address(keys_XKDPI[page, unit.kv_head]), address(values_XKBPVI[page, unit.kv_head])
        for i in range(parts):
            keys_A[np.uintp(index * parts + i)] = key + i * PART * ITEM
        for i in range(PARTS):
            values_A[np.uintp(index * PARTS + i)] = value + i * value_part
    for i in range(pages * parts, len(keys_A)):
        keys_A[np.uintp(i)] = keys_A[0]


@part()
def _attend_unit(unit, following, slot, qkv_TN, shape, plan, layer, mixed_TN, thread, space):
    """Compute a unit, stretch by stretch, whose first one's addresses are in `slot`; return the slot of the
    `following` unit's first ones."""
    keys_XKDPI, values_XKBPVI = layer.keys_XKDPI, layer.values_XKBPVI
    q_RD, scores_RP, mixed_RD = space.queries_SRD[thread], space.scores_SRP[thread], space.mixed_SRD[thread]
    peak_R, total_R = space.peaks_SR[thread], space.totals_SR[thread]
    size, group = shape.head_dim, shape.heads // shape.kv_heads
    rows, first_head = unit.tokens * group, unit.kv_head * group
    # a literal has a type of its own, for which functions would be compiled again
    no, yes, one = np.int64(0), np.int64(1), np.float32(1.0)
    filled = (shape.page + PART - 1) // PART * PART  # scores of a page; those behind it do not count
    # of a position the numbers that lie together, one float32 or two bfloat16, take ITEM bytes
    item, positions = keys_XKDPI.itemsize, values_XKBPVI.shape[3] * values_XKBPVI.shape[5]
    by = x_item(keys_XKDPI.dtype)  # bytes of a number that they are multiplied by
    key_row, value_row = keys_XKDPI.shape[3] * item, PART * item
    value_part = values_XKBPVI.shape[3] * PART * ITEM
    row, mixed_row = scores_RP.shape[1] * ITEM, mixed_RD.shape[1] * ITEM
    pages_at_once = space.values_S2A.shape[2] // PARTS
    scores, mixed = address(scores_RP), address(mixed_RD)
    if rotated_by_attention(shape, plan.begin_J[unit.span + 1] - plan.begin_J[unit.span]):
        rotate_token(qkv_TN, unit.first, unit.kv_head, unit.position, unit.span, one, one, shape, plan, layer)
    for r in range(rows):
        t, at = unit.first + r // group, (first_head + r % group) * size
        peak_R[r], total_R[r] = -np.inf, 0
        if by == BFLOAT16_ITEM:
            narrow(address(qkv_TN[t]) + at * ITEM, address(q_RD[r]), size)
        else:
            for d in range(size):
                q_RD[r, d] = qkv_TN[t, np.uintp(at + d)]
        for d in range(size):
            mixed_RD[r, d] = 0
    begin = unit.first_page
    while begin <= unit.last_page:
        end, ahead = min(begin + pages_at_once, unit.last_page + 1), slot
        if end <= unit.last_page:
            ahead = 1 - slot
            _write_addresses(unit, end, ahead, shape, plan, layer, thread, space)
        elif following.tokens:
            ahead = 1 - slot
            _write_addresses(following, following.first_page, ahead, shape, plan, layer, thread, space)
        keys, keys_ahead = address(space.keys_S2A[thread, slot]), address(space.keys_S2A[thread, ahead])
        for p in range(0, (end - begin) * filled // PART, PARTS):
            multiply_paged(
                rows, keys_XKDPI.dtype, address(q_RD), size * ITEM, no, keys + p * ADDRESS, no, yes, key_row,
                size, scores + p * PART * ITEM, row, no, keys_ahead + p * ADDRESS,
            )  # fmt: skip
        for r in range(rows):
            own = unit.position + r // group
            _softmax(r, begin, end, own, by, filled, shape, layer, scores_RP, peak_R, total_R, mixed_RD)
        for b in range(0, values_XKBPVI.shape[2], PARTS):
            multiply_paged(
                rows, values_XKBPVI.dtype, scores, row, filled * by, address(space.values_S2A[thread, slot]),
                b * value_part, end - begin, value_row, positions, mixed + b * PART * ITEM, mixed_row, yes,
                address(space.values_S2A[thread, ahead]),
            )  # fmt: skip
        begin, slot = end, ahead
    for r in range(rows):
        at, share = (first_head + r % group) * size, one / total_R[r]
        for d in range(size):
            mixed_TN[unit.first + r // group, np.uintp(at + d)] = mixed_RD[r, d] * share
    return slot


@part()
def _softmax(r, first, end, own, by, filled, shape, layer, scores_RP, peak_R, total_R, mixed_RD):
    """Turn the scores of pages first to end of a row, whose token is at position `own`, into weights, `by`
    bytes each, 0 where it does not look; keep up what came before."""
    size, mixed, page_size, window = (end - first) * filled, address(mixed_RD[r]), shape.page, layer.window
    scores = address(scores_RP[r])
    behind = scores + size * ITEM
    if layer.softcap > 0:
        for p in range(0, size, LANES):
            soft_cap(scores + p * ITEM, layer.softcap)
    # before its window, behind what a page holds, or beyond its own position
    seen = max(first, (own + 1) // page_size)  # pages up to here are seen as they are, if not for these two
    for page in range(first if window or filled > page_size else seen, end):
        at, hidden = (page - first) * filled, own - window + 1 - page * page_size if window else 0
        for p in range(at, at + min(max(hidden, 0), filled)):
            scores_RP[r, np.uintp(p)] = -np.inf
        for p in range(at + max(0, min(own + 1 - page * page_size, page_size)), at + filled):
            scores_RP[r, np.uintp(p)] = -np.inf
    most = vector_max(scores, behind)
    peak = most if most > peak_R[r] else peak_R[r]
    if peak == -np.inf:  # not one of them so far
        for p in range(size):
            scores_RP[r, p] = 0
        return
    if peak > peak_R[r]:
        if peak_R[r] > -np.inf:
            kept = exp(peak_R[r] - peak)
            total_R[r] *= kept
            rescale(mixed, mixed + mixed_RD.shape[1] * ITEM, kept)
        peak_R[r] = peak
    if by == BFLOAT16_ITEM:
        total_R[r] += exp_minus_max_sum_narrow(scores, behind, peak)
    else:
        total_R[r] += exp_minus_max_sum(scores, behind, peak)
