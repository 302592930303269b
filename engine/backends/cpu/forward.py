"""A step of a model built like Llama, as one compiled function: what threads run side by side, layer after
layer.

The model's layers are two RMS norms, rotary attention with or without a norm of queries and keys, and a gated
MLP. Everything here computes a token's numbers in an order that does not depend on what else is in the step:
results are the same to the last bit, whatever shares the batch and however a prompt was cut.

L layers, T tokens of the step, M width, N outputs of a product, H query heads, K KV heads, D head size, E
half of it, F intermediate size, C panels of W outputs, X pages, P positions of a page, B blocks of V
dimensions of a value, J pieces of requests, R tokens whose logits are wanted, S threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.attention import Heads, apply_rope, attend
from engine.backends.cpu.gemm import ITEM, LANES, LINE, WIDE, multiply_wide
from engine.backends.cpu.jit import part, whole
from engine.backends.cpu.threads import barrier, begin_together, fetch_add
from engine.backends.cpu.vector_math import address, gelu, inverse_rms, silu

BLOCK = 64  # rows that go through a panel together: with DEPTH numbers of each, they stay in the second cache
DEPTH = 768  # inner steps at a time
PHASES = 6  # of a layer


class Panels(NamedTuple):
    """Weights of a product in each layer, in the order in which they are read: float32, or int8 with
    scales."""

    numbers: np.ndarray  # [L, C, inner size, W]
    scales_LCW: np.ndarray  # of each output, or 0 panels


class Weights(NamedTuple):
    """Of a model, what a norm or softmax scales by folded in."""

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
    eps: float
    mlp_eps: float
    last_eps: float
    head_eps: float


class Plan(NamedTuple):
    """What a step computes: pieces of requests, one after the other."""

    ids_T: np.ndarray
    begin_J: np.ndarray  # first token of a piece, and one more: the number of tokens
    computed_J: np.ndarray  # tokens of the request before it
    table_J: np.ndarray  # where its pages begin in `pages`, and one more
    pages: np.ndarray
    cos_TE: np.ndarray
    sin_TE: np.ndarray
    wanted_R: np.ndarray  # rising
    windows_L: np.ndarray  # 0 is none


class Space(NamedTuple):
    """Room for a step; rows of whole panels."""

    x_TM: np.ndarray  # the residual stream
    qkv_TN: np.ndarray
    mixed_TN: np.ndarray
    inner_TF: np.ndarray
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
def _product(counter, rows, x_TM, size, eps, panels_CMW, scales_CW, out_TN, bias_N, norms_T):
    """out = norm(x) by panels + bias, for the first `rows` of x; out += x by panels + bias where eps < 0."""
    panels, x_row, out_row = len(panels_CMW), x_TM.shape[1] * ITEM, out_TN.shape[1] * ITEM
    units, known = (rows + BLOCK - 1) // BLOCK * panels, -1
    unit = fetch_add(counter)
    while unit < units:
        following = fetch_add(counter)
        block, panel = unit // panels, unit % panels
        begin = block * BLOCK
        end = min(begin + BLOCK, rows)
        if eps >= 0 and block != known:
            known = block
            inverse_rms(x_TM, begin, end, size, eps, norms_T)
        _panel(
            end - begin, address(x_TM) + begin * x_row, x_row, size, panels_CMW, scales_CW, panel,
            address(out_TN) + begin * out_row + panel * WIDE * ITEM, out_row,
            address(norms_T) if eps >= 0 else 0, 0 if eps >= 0 else 1,
            following % panels if following < units else panel,
        )  # fmt: skip
        if len(bias_N):
            for t in range(begin, end):
                for n in range(panel * WIDE, (panel + 1) * WIDE):
                    out_TN[t, n] += bias_N[n]
        unit = following


@part()
def _gated(
    counter, rows, x_TM, size, eps, panels_CMW, scales_CW, out_TF, bias_N, with_gelu, norms_T, both_2TW
):
    """out = activation(norm(x) by gates) * (norm(x) by values), for the first `rows` of x."""
    pairs, x_row, row = len(panels_CMW) // 2, x_TM.shape[1] * ITEM, WIDE * ITEM
    gate, up = address(both_2TW[0]), address(both_2TW[1])
    units, known = (rows + BLOCK - 1) // BLOCK * pairs, -1
    unit = fetch_add(counter)
    while unit < units:
        following = fetch_add(counter)
        block, pair = unit // pairs, unit % pairs
        begin = block * BLOCK
        end = min(begin + BLOCK, rows)
        if block != known:
            known = block
            inverse_rms(x_TM, begin, end, size, eps, norms_T)
        for half in range(2):
            panel = 2 * pair + half
            _panel(
                end - begin, address(x_TM) + begin * x_row, x_row, size, panels_CMW, scales_CW, panel,
                up if half else gate, row, address(norms_T), 0 if eps >= 0 else 1,
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
    arrivals = address(space.counts)
    counter = arrivals + LINE
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        for m in range(width):
            x_TM[t, m] = weights.embedding_VM[plan.ids_T[t], m]
    met = barrier(arrivals, threads)
    for layer in range(shape.layers):
        keys_XKDP, values_XKBPV = keys_LXKDP[layer], values_LXKBPV[layer]
        panels_CMW, scales_CW, bias_N = _of(weights.qkv, weights.qkv_bias_LN, layer)
        _product(counter, rows, x_TM, width, shape.eps, panels_CMW, scales_CW, qkv_TN, bias_N, norms_T)
        met = barrier(arrivals, met + threads)
        apply_rope(counter + 8, qkv_TN, shape, weights.head_norm_LQD[layer], plan, keys_XKDP, values_XKBPV)
        met = barrier(arrivals, met + threads)
        window = plan.windows_L[layer]
        attend(
            counter + 16, qkv_TN, shape, plan, window, keys_XKDP, values_XKBPV, mixed_TN, thread, space.heads
        )  # fmt: skip
        met = barrier(arrivals, met + threads)
        if layer == shape.layers - 1 and len(wanted_R) < rows:  # nothing reads what the others come to
            rows = len(wanted_R)
            if thread == 0:
                for r in range(rows):
                    for n in range(mixed_TN.shape[1]):
                        mixed_TN[r, n] = mixed_TN[wanted_R[r], n]
                    for m in range(width):
                        x_TM[r, m] = x_TM[wanted_R[r], m]
            met = barrier(arrivals, met + threads)
        panels_CMW, scales_CW, bias_N = _of(weights.out, weights.out_bias_LM, layer)
        size = shape.heads * shape.head_dim
        _product(counter + 24, rows, mixed_TN, size, -1.0, panels_CMW, scales_CW, x_TM, bias_N, norms_T)
        met = barrier(arrivals, met + threads)
        panels_CMW, scales_CW, bias_N = _of(weights.gate_up, weights.gate_up_bias_LN, layer)
        _gated(
            counter + 32, rows, x_TM, width, shape.mlp_eps, panels_CMW, scales_CW, inner_TF, bias_N,
            shape.gelu, norms_T, both_2TW,
        )  # fmt: skip
        met = barrier(arrivals, met + threads)
        panels_CMW, scales_CW, bias_N = _of(weights.down, weights.down_bias_LM, layer)
        _product(
            counter + 40, rows, inner_TF, shape.inner, -1.0, panels_CMW, scales_CW, x_TM, bias_N, norms_T
        )
        met = barrier(arrivals, met + threads)
        counter += 8 * PHASES
    # a literal has its own type
    panels_CMW, scales_CW, bias_N = _of(weights.head, weights.head_bias_LV, np.int64(0))
    _product(
        counter, rows, x_TM, width, shape.last_eps, panels_CMW, scales_CW, space.logits_RV, bias_N, norms_T
    )
    barrier(arrivals, met + threads)
