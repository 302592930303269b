"""A step of a decoder, as one compiled function that threads run side by side, layer after layer.

A layer is rotary attention, with or without a norm of queries and keys, and a gated MLP, each with RMS norms
before and after it where the model has them; `engine.backends.cpu.fold` makes other decoders into this one.
Everything here computes a token's numbers in an order that does not depend on what else is in the step:
results are the same to the last bit, whatever shares the batch and however a prompt was cut.

L layers, T tokens of the step, M width, N outputs of a product, H query heads, K KV heads, D head size, E
half of it, F intermediate size, C panels of W outputs, X pages, P positions of a page, B blocks of V
dimensions of a value, J spans of requests, R tokens whose logits are wanted, S threads, U, Z and Y as in
`engine.backends.cpu.x_rows`, I inner steps that lie together.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backends.cpu.attention import Heads, attend
from engine.backends.cpu.jit import part, whole
from engine.backends.cpu.linear import (
    ACCUMULATE,
    NO_SOFTCAP,
    OVERWRITE,
    Gate,
    Panels,
    Store,
    first_place,
    gated_product,
    layer_of,
    linear_product,
)
from engine.backends.cpu.rope import AttentionLayer, has_chunks, rotate_chunks
from engine.backends.cpu.simd import CACHE_LINE
from engine.backends.cpu.threads import INT64_BYTES, barrier, job_of, run_together
from engine.backends.cpu.vector_math import add_norm, address, widened
from engine.backends.cpu.x_rows import NO_NORM, Own

PHASES_PER_LAYER = 6
QKV, ROPE, ATTENTION, OUT, GATE_UP, DOWN = range(PHASES_PER_LAYER)


class Weights(NamedTuple):
    """A model's weights, with all that can be folded into them."""

    embedding_VM: np.ndarray  # float32, or bfloat16 as uint16
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
    """A model's numbers."""

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
    """A step's tokens: spans of requests, one after the other."""

    ids_T: np.ndarray
    begin_J: np.ndarray  # first token of a span, and one more: the number of tokens
    computed_J: np.ndarray  # tokens of the request before it
    table_J: np.ndarray  # where its pages begin in `pages`, and one more
    pages: np.ndarray
    cos_GTE: np.ndarray  # of G kinds of layers
    sin_GTE: np.ndarray
    wanted_R: np.ndarray  # rising


class Space(NamedTuple):
    """Memory of steps of at most so many tokens; rows are whole panels."""

    x_TM: np.ndarray  # the residual stream
    qkv_TN: np.ndarray
    mixed_TN: np.ndarray
    inner_TF: np.ndarray
    added_TM: np.ndarray  # sums that are normed before the stream takes them, or 0 rows
    counts: np.ndarray  # int64: arrivals at barriers, then for each phase a counter a thread
    factors_ST: np.ndarray  # of each thread its own, from here on; see x_rows.Own
    starts_SZU: np.ndarray
    rows_SUY: np.ndarray
    both_S2TW: np.ndarray
    heads: Heads


@part()
def _embed(plan, weights, shape, begin, end, x_TM):
    """Look up tokens from begin to end."""
    scale = np.float32(shape.embedding_scale)
    for t in range(begin, end):
        mean = np.float32(0.0)
        if shape.centred:
            for m in range(shape.width):
                mean += widened(weights.embedding_VM[plan.ids_T[t], m])
            mean /= np.float32(shape.width)
        for m in range(shape.width):
            x_TM[t, m] = (widened(weights.embedding_VM[plan.ids_T[t], m]) - mean) * scale


@part()
def _keep_wanted(wanted_R, rows_TN):
    """Move the wanted rows to the front, where they are in the same order."""
    for r in range(len(wanted_R)):
        for n in range(rows_TN.shape[1]):
            rows_TN[r, n] = rows_TN[wanted_R[r], n]


@part()
def _first_places(weights, shape, layer, rows, wanted, own):
    """Return where the panels lie that a thread begins the products with that follow those of queries, keys
    and values, of attention's output, of gates and values, and of the MLP's output of a layer.

    Args:
        rows, wanted: of all the step's tokens, and of those that the last layer goes on with.
    """
    left = wanted if layer == shape.layers - 1 else rows
    out = first_place(layer_of(weights.out, weights.out_bias_LM, layer), 1, left, own)
    gate_up = first_place(layer_of(weights.gate_up, weights.gate_up_bias_LN, layer), 2, left, own)
    down = first_place(layer_of(weights.down, weights.down_bias_LM, layer), 1, left, own)
    after = first_place(layer_of(weights.head, weights.head_bias_LV, np.int64(0)), 1, left, own)
    if layer < shape.layers - 1:
        after = first_place(layer_of(weights.qkv, weights.qkv_bias_LN, layer + 1), 1, rows, own)
    return (gate_up, down, out, after) if shape.parallel else (out, gate_up, down, after)


@part()
def _add_product(
    work, arrivals, arrived, rows, x_TN, size, linear, following, shape, after_M, after_eps, own, space
):  # fmt: skip
    """Add x by a linear layer to the residual stream, by way of a norm where the model has one there."""
    after = len(after_M) > 0
    target = Store(space.added_TM if after else space.x_TM, OVERWRITE if after else ACCUMULATE, NO_SOFTCAP)
    linear_product(work, rows, x_TN, size, NO_NORM, linear, following, own, target)
    threads = own.threads
    arrived = barrier(arrivals, arrived + threads)
    if after:
        begin, end = rows * own.thread // threads, rows * (own.thread + 1) // threads
        add_norm(space.added_TM, begin, end, shape.width, after_eps, after_M, space.x_TM)
        arrived = barrier(arrivals, arrived + threads)
    return arrived


@part()
def _share_of_step(thread, threads, weights, shape, plan, keys_LXKDPI, values_LXKBPVI, space, logits_RV):
    """Compute a thread's share of each phase of a step; threads wait for each other before the next."""
    x_TM, qkv_TN, mixed_TN, inner_TF = space.x_TM, space.qkv_TN, space.mixed_TN, space.inner_TF
    width, rows, wanted_R = shape.width, len(plan.ids_T), plan.wanted_R
    own = Own(thread, threads, space.factors_ST[thread], space.starts_SZU[thread], space.rows_SUY[thread])
    both_2TW = space.both_S2TW[thread]
    arrivals = address(space.counts)
    work = arrivals + CACHE_LINE  # a layer's counters
    counters = INT64_BYTES * threads  # bytes of a phase's
    _embed(plan, weights, shape, rows * thread // threads, rows * (thread + 1) // threads, x_TM)
    arrived = barrier(arrivals, threads)
    chunked = has_chunks(shape, plan)
    for layer in range(shape.layers):
        qkv = layer_of(weights.qkv, weights.qkv_bias_LN, layer)
        after_qkv, after_out, after_gate_up, after_down = _first_places(
            weights, shape, layer, rows, len(wanted_R), own
        )
        target = Store(qkv_TN, OVERWRITE, NO_SOFTCAP)
        linear_product(work + QKV * counters, rows, x_TM, width, shape.eps, qkv, after_qkv, own, target)
        arrived = barrier(arrivals, arrived + threads)
        rope = weights.ropes_L[layer]
        attention = AttentionLayer(
            weights.windows_L[layer], weights.softcaps_L[layer], weights.head_norm_LQD[layer],
            plan.cos_GTE[rope], plan.sin_GTE[rope], keys_LXKDPI[layer], values_LXKBPVI[layer],
        )  # fmt: skip
        if chunked:
            rotate_chunks(work + ROPE * counters, qkv_TN, shape, plan, attention)
            arrived = barrier(arrivals, arrived + threads)
        attend(
            work + ATTENTION * counters, qkv_TN, shape, plan, attention, mixed_TN, thread, threads,
            space.heads,
        )  # fmt: skip
        arrived = barrier(arrivals, arrived + threads)
        if layer == shape.layers - 1 and len(wanted_R) < rows:  # nothing reads the other tokens' results
            rows = len(wanted_R)
            if thread == 0:
                _keep_wanted(wanted_R, mixed_TN)
                _keep_wanted(wanted_R, x_TM)
            arrived = barrier(arrivals, arrived + threads)
        for order in range(2):  # attention is added, then the MLP reads the stream; if parallel, after it
            if order == shape.parallel:
                out = layer_of(weights.out, weights.out_bias_LM, layer)
                arrived = _add_product(
                    work + OUT * counters, arrivals, arrived, rows, mixed_TN, shape.heads * shape.head_dim,
                    out, after_out, shape, weights.after_attention_LM[layer], shape.after_attention_eps, own,
                    space,
                )  # fmt: skip
            else:
                gate_up = layer_of(weights.gate_up, weights.gate_up_bias_LN, layer)
                gate = Gate(inner_TF, both_2TW, shape.gelu)
                gated_product(
                    work + GATE_UP * counters, rows, x_TM, width, shape.mlp_eps, gate_up, after_gate_up,
                    own, gate,
                )  # fmt: skip
                arrived = barrier(arrivals, arrived + threads)
        down = layer_of(weights.down, weights.down_bias_LM, layer)
        arrived = _add_product(
            work + DOWN * counters, arrivals, arrived, rows, inner_TF, shape.inner, down, after_down, shape,
            weights.after_mlp_LM[layer], shape.after_mlp_eps, own, space,
        )  # fmt: skip
        work += PHASES_PER_LAYER * counters
    logits = Store(logits_RV, OVERWRITE, np.float32(shape.logits_softcap))
    head = layer_of(weights.head, weights.head_bias_LV, np.int64(0))
    next_step = first_place(layer_of(weights.qkv, weights.qkv_bias_LN, np.int64(0)), 1, rows, own)
    linear_product(work, rows, x_TM, width, shape.last_eps, head, next_step, own, logits)


@whole
def forward(shared, threads, weights, shape, plan, keys_LXKDPI, values_LXKBPVI, space, logits_RV):
    """Compute a step by the threads of a team, which have `shared`.

    It writes the step's keys and values into their pages, and the logits of the wanted tokens.
    """
    space.counts[:] = 0
    arguments = weights, shape, plan, keys_LXKDPI, values_LXKBPVI, space, logits_RV
    run_together(shared, threads, job_of(_share_of_step, arguments))
