"""A step of a decoder, as one compiled function: what threads run side by side, layer after layer.

A layer is rotary attention, with or without a norm of queries and keys, and a gated MLP, each with RMS norms
before and after it where the model has them; `engine.backends.cpu.fold` makes other decoders into this one.
Everything here computes a token's numbers in an order that does not depend on what else is in the step:
results are the same to the last bit, whatever shares the batch and however a prompt was cut.

L layers, T tokens of the step, M width, N outputs of a product, H query heads, K KV heads, D head size, E
half of it, F intermediate size, C panels of W outputs, X pages, P positions of a page, B blocks of V
dimensions of a value, J spans of requests, R tokens whose logits are wanted, S threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.attention import Heads, apply_rope, attend
from engine.backends.cpu.gemm import WIDE, multiply_wide
from engine.backends.cpu.jit import part, whole
from engine.backends.cpu.simd import CACHE_LINE, ITEM, LANES
from engine.backends.cpu.threads import barrier, begin_together, fetch_add
from engine.backends.cpu.vector_math import add_norm, address, gelu, inverse_rms, silu, soft_cap

BLOCK = 64  # rows that go through a panel together: with DEPTH numbers of each, they stay in the second cache
DEPTH = 768  # inner steps at a time
PHASES = 6  # of a layer
NO_NORM = -1.0  # in place of a norm's epsilon


class Panels(NamedTuple):
    """Weights of a product in each layer, in the order in which they are read: float32, or int8 with
    scales."""

    numbers: np.ndarray  # [L, C, inner size, W]
    scales_LCW: np.ndarray  # of each output, or 0 panels


class Weights(NamedTuple):
    """Of a model, with all that can be folded into them."""

    embedding_VM: np.ndarray
    qkv: Panels
    out: Panels
    gate_up: Panels  # a panel of gates before each of values
    down: Panels
    head: Panels  # the output layer
    qkv_bias_LN: np.ndarray  # biases have no columns where there are none
    out_bias_LM: np.ndarray
    gate_up_bias_LN: np.ndarray
    down_bias_LM: np.ndarray
    head_bias_LV: np.ndarray
    head_norm_LQD: np.ndarray  # of queries' and keys' heads, Q = H + K, or 0
    after_attention_LM: np.ndarray  # of norms after a layer's parts, or of no columns
    after_mlp_LM: np.ndarray
    windows_L: np.ndarray  # of attention, 0 is none
    softcaps_L: np.ndarray  # of attention's scores, 0 is none
    ropes_L: np.ndarray  # which angles a layer rotates by


class Shape(NamedTuple):
    """Numbers of a model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # F
    page: int  # positions of a page that are used
    gelu: bool
    parallel: int  # 1: the MLP reads the stream as it is before attention is added
    whole_norm: bool  # queries' heads have one norm together, and keys' heads
    centred: bool  # the stream has a mean of 0
    embedding_scale: float
    logits_softcap: float  # 0 is none
    eps: float  # of each norm, or NO_NORM
    mlp_eps: float
    last_eps: float
    head_eps: float
    after_attention_eps: float
    after_mlp_eps: float


class Plan(NamedTuple):
    """What a step computes: spans of requests, one after the other."""

    ids_T: np.ndarray
    begin_J: np.ndarray  # first token of a span, and one more: the number of tokens
    computed_J: np.ndarray  # tokens of the request before it
    table_J: np.ndarray  # where its pages begin in `pages`, and one more
    pages: np.ndarray
    cos_GTE: np.ndarray  # of G kinds of layers
    sin_GTE: np.ndarray
    wanted_R: np.ndarray  # rising


class Space(NamedTuple):
    """Room for a step; rows of whole panels."""

    x_TM: np.ndarray  # the residual stream
    qkv_TN: np.ndarray
    mixed_TN: np.ndarray
    inner_TF: np.ndarray
    added_TM: np.ndarray  # what a norm is taken of before it is added, or 0 rows
    logits_RV: np.ndarray
    counts: np.ndarray  # int64: arrivals, then a number for each phase
    norms_ST: np.ndarray  # of each thread its own, from here on
    both_S2TW: np.ndarray
    heads: Heads


@part()
def _panel(rows, x, x_row, size, panels_CMW, scales_CW, panel, out, out_row, row_scales, add, following):
    """out [rows, WIDE] (+)= row_scales * x [rows, size] by one panel; asks for the `following` one
    meanwhile."""
    item, scales = panels_CMW.itemsize, address(scales_CW) + panel * WIDE * ITEM if len(scales_CW) else 0
    length = size * WIDE * item
    w, ahead = address(panels_CMW) + panel * length, address(panels_CMW) + following * length
    end = ahead + length
    for k in range(0, size, DEPTH):
        ahead = multiply_wide(
            rows, panels_CMW.dtype, x + k * ITEM, x_row, w + k * WIDE * item, WIDE * item,
            min(DEPTH, size - k), out, out_row, row_scales, scales, 1 if add or k > 0 else 0, ahead, end,
        )  # fmt: skip


@part()
def _norm_rows(x_TM, begin, end, size, eps, norms_T):
    """Write what a norm multiplies rows by, from norms_T[0] on; gives where they are, or 0 for no norm."""
    if eps < 0:
        return 0
    for t in range(begin, end):
        norms_T[t - begin] = inverse_rms(x_TM, t, np.int64(0), size, eps)
    return address(norms_T)


@part()
def _product(counter, rows, x_TM, size, eps, panels_CMW, scales_CW, out_TN, bias_N, norms_T, add, softcap):
    """out (+)= norm(x) by panels + bias, soft-capped, for the first `rows` of x."""
    panels, x_row, out_row = len(panels_CMW), x_TM.shape[1] * ITEM, out_TN.shape[1] * ITEM
    units, known, row_scales = (rows + BLOCK - 1) // BLOCK * panels, -1, 0
    unit = fetch_add(counter)
    while unit < units:
        following = fetch_add(counter)
        block, panel = unit // panels, unit % panels
        begin = block * BLOCK
        end = min(begin + BLOCK, rows)
        if block != known:
            known, row_scales = block, _norm_rows(x_TM, begin, end, size, eps, norms_T)
        out = address(out_TN) + begin * out_row + panel * WIDE * ITEM
        _panel(
            end - begin, address(x_TM) + begin * x_row, x_row, size, panels_CMW, scales_CW, panel, out,
            out_row, row_scales, add, following % panels if following < units else panel,
        )  # fmt: skip
        if len(bias_N):
            for t in range(begin, end):
                for n in range(panel * WIDE, (panel + 1) * WIDE):
                    out_TN[t, n] += bias_N[n]
        if softcap > 0:
            for t in range(end - begin):
                for n in range(0, WIDE, LANES):
                    soft_cap(out + t * out_row + n * ITEM, softcap)
        unit = following


@part()
def _gated(
    counter, rows, x_TM, size, eps, panels_CMW, scales_CW, out_TF, bias_N, with_gelu, norms_T, both_2TW
):
    """out = activation(norm(x) by gates) * (norm(x) by values), for the first `rows` of x."""
    pairs, x_row, row = len(panels_CMW) // 2, x_TM.shape[1] * ITEM, WIDE * ITEM
    gate, up = address(both_2TW[0]), address(both_2TW[1])
    units, known, row_scales = (rows + BLOCK - 1) // BLOCK * pairs, -1, 0
    unit = fetch_add(counter)
    while unit < units:
        following = fetch_add(counter)
        block, pair = unit // pairs, unit % pairs
        begin = block * BLOCK
        end = min(begin + BLOCK, rows)
        if block != known:
            known, row_scales = block, _norm_rows(x_TM, begin, end, size, eps, norms_T)
        for half in range(2):
            panel = 2 * pair + half
            _panel(
                end - begin, address(x_TM) + begin * x_row, x_row, size, panels_CMW, scales_CW, panel,
                up if half else gate, row, row_scales, 0,
                panel + 1 if half == 0 else 2 * (following % pairs) if following < units else panel,
            )  # fmt: skip
            if len(bias_N):
                for t in range(end - begin):
                    for n in range(WIDE):
                        both_2TW[half, t, n] += bias_N[panel * WIDE + n]
        for at in range(0, (end - begin) * row, LANES * ITEM):
            if with_gelu:
                gelu(gate + at, up + at)
            else:
                silu(gate + at, up + at)
        for t in range(end - begin):
            for w in range(WIDE):
                out_TF[begin + t, pair * WIDE + w] = both_2TW[0, t, w]
        unit = following


@part()
def _embed(plan, weights, shape, begin, end, x_TM):
    """Look up tokens from begin to end."""
    scale = np.float32(shape.embedding_scale)
    for t in range(begin, end):
        mean = np.float32(0.0)
        if shape.centred:
            for m in range(shape.width):
                mean += weights.embedding_VM[plan.ids_T[t], m]
            mean /= np.float32(shape.width)
        for m in range(shape.width):
            x_TM[t, m] = (weights.embedding_VM[plan.ids_T[t], m] - mean) * scale


@part()
def _keep_wanted(wanted_R, rows_TN):
    """Move the wanted rows to the front, where they are in the same order."""
    for r in range(len(wanted_R)):
        for n in range(rows_TN.shape[1]):
            rows_TN[r, n] = rows_TN[wanted_R[r], n]


@part()
def _add_product(
    counter, arrivals, met, thread, threads, rows, x_TN, size, weights, shape, after_M, after_eps, norms_T,
    space,
):  # fmt: skip
    """Add x by panels + bias to the residual stream, by way of a norm where the model has one there."""
    panels_CMW, scales_CW, bias_M = weights
    after = len(after_M) > 0
    _product(
        counter, rows, x_TN, size, NO_NORM, panels_CMW, scales_CW, space.added_TM if after else space.x_TM,
        bias_M, norms_T, 0 if after else 1, np.float32(0.0),
    )  # fmt: skip
    met = barrier(arrivals, met + threads)
    if after:
        begin, end = rows * thread // threads, rows * (thread + 1) // threads
        add_norm(space.added_TM, begin, end, shape.width, after_eps, after_M, space.x_TM)
        met = barrier(arrivals, met + threads)
    return met


@part()
def _of(panels, bias_LN, layer):
    return panels.numbers[layer], panels.scales_LCW[layer], bias_LN[layer]


@whole
def step(thread, threads, start, weights, shape, plan, keys_LXKDP, values_LXKBPV, space):
    """Compute a step: what thread `thread` of a team does, with its `start`. `space.counts` is all zero
    before.

    Writes the step's keys and values into their pages, and the logits of the wanted tokens.
    """
    begin_together(thread, start)
    x_TM, qkv_TN, mixed_TN, inner_TF = space.x_TM, space.qkv_TN, space.mixed_TN, space.inner_TF
    width, rows, wanted_R = shape.width, len(plan.ids_T), plan.wanted_R
    norms_T, both_2TW = space.norms_ST[thread], space.both_S2TW[thread]
    no_cap = np.float32(0.0)
    arrivals = address(space.counts)
    counter = arrivals + CACHE_LINE
    _embed(plan, weights, shape, rows * thread // threads, rows * (thread + 1) // threads, x_TM)
    met = barrier(arrivals, threads)
    for layer in range(shape.layers):
        keys_XKDP, values_XKBPV = keys_LXKDP[layer], values_LXKBPV[layer]
        panels_CMW, scales_CW, bias_N = _of(weights.qkv, weights.qkv_bias_LN, layer)
        _product(
            counter, rows, x_TM, width, shape.eps, panels_CMW, scales_CW, qkv_TN, bias_N, norms_T, 0, no_cap
        )
        met = barrier(arrivals, met + threads)
        rope = weights.ropes_L[layer]
        apply_rope(
            counter + 8, qkv_TN, shape, weights.head_norm_LQD[layer], plan, plan.cos_GTE[rope],
            plan.sin_GTE[rope], keys_XKDP, values_XKBPV,
        )  # fmt: skip
        met = barrier(arrivals, met + threads)
        attend(
            counter + 16, qkv_TN, shape, plan, weights.windows_L[layer], weights.softcaps_L[layer], keys_XKDP,
            values_XKBPV, mixed_TN, thread, space.heads,
        )  # fmt: skip
        met = barrier(arrivals, met + threads)
        if layer == shape.layers - 1 and len(wanted_R) < rows:  # nothing reads what the others come to
            rows = len(wanted_R)
            if thread == 0:
                _keep_wanted(wanted_R, mixed_TN)
                _keep_wanted(wanted_R, x_TM)
            met = barrier(arrivals, met + threads)
        for turn in range(2):  # the MLP reads the stream when attention is added, or if parallel before
            if turn == shape.parallel:
                met = _add_product(
                    counter + 24, arrivals, met, thread, threads, rows, mixed_TN,
                    shape.heads * shape.head_dim, _of(weights.out, weights.out_bias_LM, layer), shape,
                    weights.after_attention_LM[layer], shape.after_attention_eps, norms_T, space,
                )  # fmt: skip
            else:
                panels_CMW, scales_CW, bias_N = _of(weights.gate_up, weights.gate_up_bias_LN, layer)
                _gated(
                    counter + 32, rows, x_TM, width, shape.mlp_eps, panels_CMW, scales_CW, inner_TF, bias_N,
                    shape.gelu, norms_T, both_2TW,
                )  # fmt: skip
                met = barrier(arrivals, met + threads)
        met = _add_product(
            counter + 40, arrivals, met, thread, threads, rows, inner_TF, shape.inner,
            _of(weights.down, weights.down_bias_LM, layer), shape, weights.after_mlp_LM[layer],
            shape.after_mlp_eps, norms_T, space,
        )  # fmt: skip
        counter += 8 * PHASES
    # a literal has its own type
    panels_CMW, scales_CW, bias_N = _of(weights.head, weights.head_bias_LV, np.int64(0))
    _product(
        counter, rows, x_TM, width, shape.last_eps, panels_CMW, scales_CW, space.logits_RV, bias_N, norms_T,
        0, np.float32(shape.logits_softcap),
    )  # fmt: skip
    barrier(arrivals, met + threads)
