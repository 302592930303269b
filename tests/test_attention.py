"""Packed attention against the textbook: each token's softmax over its own past, alone, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

from engine import InputError
from engine.backends.transformers.paged_attention import PagedBatch, Store
from engine.models.attention_trace import AttentionCall, Options, attend
from engine.step import Batch, Span
from tests.pairwise import grid
from tests.reference import attention

KV_HEADS, DIM, VALUE_DIM = 2, 16, 12


def run(batch, layer, q_HTD, k_KTD, v_KTD, scale, window=None, softcap=None, sink_H=None) -> torch.Tensor:
    """What a batch gives, [T, H, E]."""
    module, options = SimpleNamespace(layer_idx=layer), Options(scale, window, softcap, sink_H)
    return batch.attend(AttentionCall(module, q_HTD[None], k_KTD[None], v_KTD[None], None, options))[0]


def check(requests, size, groups, rng, *, window=None, softcap=None, sinks=False, spread=1, share=0):
    """Attend one step of `requests` (computed, new) and compare; what no request owns is huge, never NaN.

    spread: how many times more pages there are than needed. share: whole pages all requests have in common,
    at most.
    """
    layers, layer = 2, 1
    heads = KV_HEADS * groups

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape))

    common = min(share, *(computed // size for computed, _ in requests))
    own = [-(-(computed + new) // size) - common for computed, new in requests]
    pages = (common + sum(own)) * spread
    ids = rng.permutation(pages)[: common + sum(own)].tolist()
    if spread == 1 and rng.integers(2):
        ids.sort()
    stores = [
        Store.zeros(pages + 1, size, KV_HEADS, DIM, VALUE_DIM, torch.zeros((), dtype=torch.float64))
        for _ in range(layers)
    ]
    for store in stores:
        store.keys_XPKD[:-1] = 1e3
        store.values_XPKE[:-1] = 1e3
    keys, values = stores[layer].keys_XPKD, stores[layer].values_XPKE
    first_k, first_v = draw(KV_HEADS, common * size, DIM), draw(KV_HEADS, common * size, VALUE_DIM)
    spans, everything, at, begin = [], [], common, 0
    for (computed, new), count in zip(requests, own, strict=True):
        k, v = (draw(KV_HEADS, computed + new, dim) for dim in (DIM, VALUE_DIM))
        k[:, : common * size], v[:, : common * size] = first_k, first_v
        table = ids[:common] + ids[at : at + count]
        for position in range(computed):
            keys[table[position // size], position % size] = k[:, position]
            values[table[position // size], position % size] = v[:, position]
        spare = [ids[0]] * int(rng.integers(2))  # a table may be longer than what is computed
        spans.append(Span(begin, begin + new, computed, table + spare))
        everything.append((k, v))
        at, begin = at + count, begin + new
    q = draw(heads, begin, DIM)
    sink_H = draw(heads) if sinks else None
    parts = [(k[:, c:], v[:, c:]) for (c, _), (k, v) in zip(requests, everything, strict=True)]
    batch = Batch([0] * begin, spans, [])
    assert batch.positions == [c + i for c, n in requests for i in range(n)]
    k_new, v_new = (torch.cat([part[i] for part in parts], 1) for i in range(2))
    out = run(PagedBatch(stores, batch, pages), layer, q, k_new, v_new, 0.7, window, softcap, sink_H)
    untouched = (stores[0].keys_XPKD, stores[0].values_XPKE)
    assert all(bool((x[:-1] == 1e3).all()) for x in untouched), "another layer's pages stay as they were"
    assert not any(bool(x[-1].any()) for x in (keys, values)), "nobody's page stays zero"
    for span, (k, v) in zip(spans, everything, strict=True):
        for t in range(span.begin, span.end):
            past = span.computed + t - span.begin + 1
            expected = attention(q[:, t], k[:, :past], v[:, :past], 0.7, window, softcap, sink_H)
            torch.testing.assert_close(out[t], expected, rtol=1e-10, atol=1e-10)
        table = torch.tensor(span.pages)[torch.arange(k.shape[1]) // size]
        for half, what in ((keys, k), (values, v)):
            found = half[table, torch.arange(k.shape[1]) % size].transpose(0, 1)
            assert torch.equal(found, what), "keys and values lie where the table says"
    return out


MIXED = [(0, 1), (0, 9), (7, 1), (5, 6), (12, 1), (3, 1)]
SINGLE = [(0, 1), (7, 1), (12, 1), (3, 1), (15, 1)]
CHUNKS = [(0, 5), (4, 3), (9, 8)]


@pytest.mark.parametrize(
    ("requests", "groups", "size", "spread"), grid((MIXED, SINGLE, CHUNKS), (1, 3, 4), (1, 4, 16), (1, 5))
)
def test_equals_the_textbook(requests, groups, size, spread):
    check(requests, size, groups, np.random.default_rng(0), spread=spread)


@pytest.mark.parametrize("options", [
    dict(window=1), dict(window=4), dict(window=7), dict(window=100), dict(softcap=0.8), dict(sinks=True),
    dict(window=5, softcap=1.3, sinks=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [1, 4, 16])
def test_windows_softcaps_and_sinks_are_honoured(size, options):
    for requests in (MIXED, SINGLE, CHUNKS):
        check(requests, size, 3, np.random.default_rng(1), **options)


@pytest.mark.parametrize("size", [1, 4])
def test_requests_may_share_pages(size):
    check([(8, 1), (9, 4), (12, 1), (8, 6)], size, 3, np.random.default_rng(2), share=2)
    check([(8, 1)] * 5, size, 4, np.random.default_rng(2), share=2, spread=3, window=6)


@settings(max_examples=4 * settings().max_examples, phases=[Phase.generate])
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 5])), min_size=1, max_size=7),
    size=st.sampled_from([1, 2, 4, 16]),
    groups=st.sampled_from([1, 3, 4]),
    window=st.none() | st.integers(1, 24),
    softcap=st.none() | st.floats(0.2, 5),
    sinks=st.booleans(),
    spread=st.integers(1, 4),
    share=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_step_equals_the_textbook(requests, size, groups, seed, **options):
    check(requests, size, groups, np.random.default_rng(seed), **options)


def test_contexts_of_very_different_length_are_not_filled_up_to_the_longest():
    """Or one long request would multiply the memory that a step takes by the number of requests."""
    store = Store.zeros(200, 4, 1, 16, 16, torch.zeros(()))
    lengths = [1, 3, 5, 9, 17, 33, 300]
    spans = [Span(i, i + 1, n - 1, list(range(-(-n // 4)))) for i, n in enumerate(lengths)]
    groups = PagedBatch([store], Batch([0] * len(spans), spans, []), 199)._groups
    read = sum(group.pages_RX.numel() for group in groups)
    assert read <= 2 * sum(len(span.pages) for span in spans)
    assert sorted(int(at) for group in groups for at in group.tokens_RN.flatten()) == list(range(len(spans)))


def call(**options):
    rows = torch.randn(1, 2, 3, DIM)
    batch = Batch([5, 6, 7], [Span(0, 3, 0, [0])], [2])
    packed = options.pop("packed", PagedBatch([Store.zeros(2, 4, 2, DIM, DIM, rows)], batch, 1))
    module = SimpleNamespace(layer_idx=0)
    return attend(module, rows, rows, rows, options.pop("attention_mask", None), packed=packed, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alibi=torch.ones(1)), "uses alibi"),
        (dict(position_bias=1.0, head_mask=2), "uses head_mask, position_bias"),
        (dict(attention_mask=torch.ones(1, 1, 3, 3)), "uses a mask"),
        (dict(packed=None), "does not pass on what attention needs"),
    ],
    ids=str,
)
def test_what_would_have_to_be_ignored_is_refused(options, message):
    with pytest.raises(InputError, match=f"{message}: use runner='padded'"):
        call(**options)


def test_harmless_keywords_and_absent_options_are_taken():
    out, weights = call(dropout=0.0, is_causal=True, position_ids=torch.arange(3), alibi=None, head_mask=None)
    assert out.shape == (1, 3, 2, DIM)
    assert weights is None
