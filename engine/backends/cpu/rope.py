"""Rotary position embedding (Su et al., 2021) of new tokens, and their keys and values in pages.

A key's numbers lie a row of its page apart, so a token writes to as many cache lines as there are dimensions,
or half as many in bfloat16. They are asked for ahead of that: stores that wait for memory do so one by one.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.jit import part
from engine.backends.cpu.paged_tile import PART
from engine.backends.cpu.simd import CACHE_LINE, ITEM
from engine.backends.cpu.threads import fetch_add
from engine.backends.cpu.vector_math import (
    ROTATED,
    address,
    inverse_rms,
    number_at,
    prefetch_to_write,
    rotate,
    store_as,
)

BLOCK = 8  # tokens of a unit of work


class AttentionLayer(NamedTuple):
    """What is a layer's own in attention."""

    window: int  # 0 is none
    softcap: float  # 0 is none
    head_norm_QD: np.ndarray  # of no rows where heads have no norm
    cos_TE: np.ndarray
    sin_TE: np.ndarray
    keys_XKDPI: np.ndarray
    values_XKBPVI: np.ndarray


@part()
def rotated_by_attention(shape, tokens):
    """Return whether the units of work that attend for a span rotate it first: one token, whose page no other
    span reads. Not where one norm is of all heads: a unit would change heads that others have yet to norm."""
    return tokens == 1 and not shape.whole_norm


@part()
def has_chunks(shape, plan):
    """Return whether a step has anything for `rotate_chunks`."""
    for span in range(len(plan.begin_J) - 1):
        if not rotated_by_attention(shape, plan.begin_J[span + 1] - plan.begin_J[span]):
            return True
    return False


@part()
def rotate_chunks(work, qkv_TN, shape, plan, layer):
    """Norm and rotate queries and keys of spans, in place, and write keys and values into their pages; all
    but those of spans that are `rotated_by_attention`.

    A unit of work is BLOCK tokens of a span with one KV head, or with all of them where one norm is of all.
    """
    size, kv_heads = shape.head_dim, shape.kv_heads
    queries = shape.heads * size  # numbers
    together = kv_heads if shape.whole_norm else 1
    parts = kv_heads // together
    q_scale = k_scale = np.float32(1.0)
    unit, before = fetch_add(work), np.int64(0)  # units of the spans before this one
    for span in range(len(plan.begin_J) - 1):
        begin, end = plan.begin_J[span], plan.begin_J[span + 1]
        units = 0 if rotated_by_attention(shape, end - begin) else (end - begin + BLOCK - 1) // BLOCK * parts
        while unit < before + units:
            kv_head = (unit - before) % parts * together
            first = begin + (unit - before) // parts * BLOCK
            for t in range(first, min(first + BLOCK, end)):
                position = plan.computed_J[span] + t - begin
                if shape.whole_norm:
                    x = address(qkv_TN[t])
                    q_scale = inverse_rms(x, queries, shape.head_eps)
                    k_scale = inverse_rms(x + queries * ITEM, kv_heads * size, shape.head_eps)
                for head in range(kv_head, kv_head + together):
                    if t + 1 < end:
                        prefetch_heads(address(qkv_TN[t + 1]), head, shape)
                    rotate_token(qkv_TN, t, head, position, span, q_scale, k_scale, shape, plan, layer)
            unit = fetch_add(work)
        before += units


@part()
def prefetch_heads(row, kv_head, shape):
    """Ask for a token's queries, key and value of a KV head's group; another thread has written some."""
    size, group = shape.head_dim * ITEM, shape.heads // shape.kv_heads
    for at in range(kv_head * group * size, (kv_head + 1) * group * size, CACHE_LINE):
        prefetch_to_write(row + at)
    for first in range(shape.heads + kv_head, shape.heads + 2 * shape.kv_heads, shape.kv_heads):
        for at in range(first * size, (first + 1) * size, CACHE_LINE):
            prefetch_to_write(row + at)


@part(forceinline=True)
def rotate_token(qkv_TN, t, kv_head, position, span, q_scale, k_scale, shape, plan, layer):
    """Norm and rotate a token's queries of a KV head's group, and its key, in place; write its key and value
    into their page.

    Args:
        q_scale, k_scale: what a norm of all queries, or of all keys, multiplies by. A norm of each head finds
            its own.
    """
    size, group, heads = shape.head_dim, shape.heads // shape.kv_heads, shape.heads
    keys_XKDPI, values_XKBPVI = layer.keys_XKDPI, layer.values_XKBPVI
    page, at = plan.pages[plan.table_J[span] + position // shape.page], position % shape.page
    item, steps = keys_XKDPI.itemsize, keys_XKDPI.shape[4]  # so many lie together, and take ITEM bytes
    key_step, value_part = keys_XKDPI.shape[3] * ITEM, values_XKBPVI.shape[3] * PART * ITEM
    key = address(keys_XKDPI[page, kv_head]) + at * ITEM
    value = address(values_XKBPVI[page, kv_head]) + at // steps * PART * ITEM + at % steps * item
    for d in range(size // steps):
        prefetch_to_write(key + d * key_step)
    for b in range(size // PART):
        prefetch_to_write(value + b * value_part)
    for g in range(group):
        _norm_and_rotate(qkv_TN, t, kv_head * group + g, q_scale, shape, layer)
    _norm_and_rotate(qkv_TN, t, heads + kv_head, k_scale, shape, layer)
    x = address(qkv_TN[t]) + (heads + kv_head) * size * ITEM
    for d in range(size // steps):
        for i in range(steps):
            store_as(number_at(x + (d * steps + i) * ITEM), key + d * key_step + i * item, keys_XKDPI.dtype)
    x += shape.kv_heads * size * ITEM
    for b in range(size // PART):
        for v in range(0, PART * ITEM, ITEM):
            store_as(number_at(x + b * PART * ITEM + v), value + b * value_part + v, values_XKBPVI.dtype)


@part(forceinline=True)
def _norm_and_rotate(qkv_TN, t, head, scale, shape, layer):
    """Rotate a head, after its norm: dimensions i and i + E are a point of a plane."""
    size, half, begin = shape.head_dim, shape.head_dim // 2, head * shape.head_dim
    x, cos, sin = address(qkv_TN[t]) + begin * ITEM, address(layer.cos_TE[t]), address(layer.sin_TE[t])
    if len(layer.head_norm_QD):
        if not shape.whole_norm:
            scale = inverse_rms(x, size, shape.head_eps)
        for d in range(size):
            qkv_TN[t, np.uintp(begin + d)] *= scale * layer.head_norm_QD[head, d]
    for e in range(0, half * ITEM, ROTATED * ITEM):
        rotate(x + e, x + half * ITEM + e, cos + e, sin + e)
