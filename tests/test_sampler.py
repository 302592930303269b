"""The sampler's draws: legal, as likely as they should be, and nobody's business but their own request's.

R rows (requests), V vocabulary. Transformers' own warpers say which tokens may be drawn and how likely each
one is. A test of `sample` holds both implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.request import Request, SamplingParams
from engine.sampling import rules
from engine.step import Choice

V = 24
DRAWS = 2000
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
Sample = Callable[[torch.Tensor, Sequence[Request]], list[Choice]]


def request(
    *,
    seed: int = 5,
    tokens: Sequence[int] = (1, 2),
    prompt_len: int = 2,
    stop_ids: frozenset[int] = frozenset({3}),
    **params,
) -> Request:
    return Request("a", prompt_len, SamplingParams(**params), list(tokens), stop_ids, seed)


def random_logits(
    rows: int, columns: int = V, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def tokens_of(choices: list[Choice]) -> list[int]:
    assert all(choice.error is None and choice.token is not None for choice in choices)
    return [choice.token for choice in choices if choice.token is not None]


def draws_at(sample: Sample, logits_V: torch.Tensor, chances: Sequence[float], asked: Request) -> list[int]:
    """The tokens that a request gets of these logits by these numbers for chance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "uniform", lambda seed, position: chances[seed])
        requests = [replace(asked, seed=place) for place in range(len(chances))]
        return tokens_of(sample(logits_V.expand(len(requests), -1), requests))


def even_draws(sample: Sample, logits_V: torch.Tensor, count: int = 64, **params) -> list[int]:
    """The tokens that come up in `count` even steps of chance: all that are likelier than one step."""
    chances = [(step + 0.5) / count for step in range(count)]
    return draws_at(sample, logits_V, chances, request(**{"temperature": 1.0, **params}))


def assert_shares(sample: Sample, logits_V: torch.Tensor, asked: Request, weights: Sequence[float]) -> None:
    """Of the range of chance each token has the share that its weight is of all, in vocabulary order."""
    likely = [token for token, weight in enumerate(weights) if weight > 1e-6]
    before, total = [math.fsum(weights[:token]) for token in likely], math.fsum(weights)
    for place in (0.001, 0.999):  # near both ends of each token's share
        chances = [
            (sums + place * weights[token]) / total for sums, token in zip(before, likely, strict=True)
        ]
        assert draws_at(sample, logits_V, chances, asked) == likely


def drawn(sample: Sample, logits_V: torch.Tensor, count: int = DRAWS, **params) -> torch.Tensor:
    """How often each token comes up in `count` draws that differ in their seed alone [V]."""
    requests = [request(seed=seed, **params) for seed in range(count)]
    tokens = tokens_of(sample(logits_V.expand(count, -1), requests))
    return torch.tensor(tokens).bincount(minlength=len(logits_V))


def oracle(
    logits_V: torch.Tensor, order: str = "temperature min_p top_k top_p", seen=(1, 2), **params
) -> torch.Tensor:
    """Probabilities by Transformers' warpers, in `order`, in float64."""
    makers = {
        "temperature": TemperatureLogitsWarper,
        "min_p": MinPLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
    }
    ids, scores = torch.tensor([list(seen)]), logits_V.double()[None]
    if "repetition_penalty" in params:
        scores = RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"]))(ids, scores)
    for name in order.split():
        if name in params:
            scores = makers[name](params[name])(ids, scores)
    return scores.softmax(-1)[0]


def assert_drawn_from(probabilities_V: torch.Tensor, counts_V: torch.Tensor) -> None:
    """No draw outside the kept set; in it, as often as expected, within bounds far out of the reach of
    chance."""
    kept_V, draws = probabilities_V > 0, int(counts_V.sum())
    assert counts_V[~kept_V].sum() == 0
    expected_V, kept = probabilities_V[kept_V] * draws, int(kept_V.sum())
    assert 0.5 * (counts_V[kept_V] - expected_V).abs().sum() / draws < 0.07
    often_V = expected_V >= 5
    chi2 = ((counts_V[kept_V] - expected_V)[often_V] ** 2 / expected_V[often_V]).sum()
    assert chi2 < kept + 5 * (2 * kept) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [64, 512, 49_152, 50_257, 151_936])
def test_greedy_takes_the_first_of_the_largest(sample, vocab, dtype):
    """Wherever it is; so are a NaN and an infinite logit found."""
    logits_RV = random_logits(9, vocab, seed=vocab, dtype=dtype)
    for row, first in enumerate([0, 63, vocab - 1]):
        logits_RV[row, [first, -1]] = 100.0
    logits_RV[3, 40], logits_RV[4, 40], logits_RV[5] = torch.nan, torch.inf, 7.0
    tokens = [choice.token for choice in sample(logits_RV, [request() for _ in range(9)])]
    assert tokens == [0, 63, vocab - 1, None, None, 0, *logits_RV[6:].argmax(-1).tolist()]


def test_greedy_ignores_filters_and_seed(sample):
    logits_RV = random_logits(2)
    requests = [request(top_k=2, top_p=0.3, min_p=0.5, seed=seed) for seed in (1, 2)]
    assert tokens_of(sample(logits_RV, requests)) == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_are_greedy(sample, temperature):
    logits_RV = random_logits(20)
    requests = [request(temperature=temperature, seed=seed) for seed in range(20)]
    assert tokens_of(sample(logits_RV, requests)) == logits_RV.argmax(-1).tolist()


def test_no_requests_give_no_choices(sample):
    assert sample(torch.empty(0, V), []) == []


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_k": V},
        {"temperature": 1.0, "top_k": 10 * V},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "repetition_penalty": 0.5},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.05, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_draws_follow_transformers(sample, params):
    logits_V = random_logits(1, seed=3)[0]
    assert_drawn_from(oracle(logits_V, **params), drawn(sample, logits_V, **params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_follow_logits_of_every_dtype(sample, dtype):
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randperm(V, generator=generator).to(dtype) / 4  # exact in every dtype, and no ties
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
    assert_drawn_from(oracle(logits_V, **params), drawn(sample, logits_V, **params))


@pytest.mark.parametrize(
    ("params", "other"),
    [
        ({"temperature": 3.0, "min_p": 0.25}, "min_p temperature"),
        ({"temperature": 0.25, "top_p": 0.7}, "top_p temperature"),
        ({"temperature": 1.0, "min_p": 0.15, "top_p": 0.8}, "temperature top_p min_p"),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, "temperature top_p top_k"),
    ],
    ids=str,
)
def test_filters_apply_in_the_stated_order(sample, params, other):
    """Temperature, min_p, top_k, top_p; `other` is an order that would keep other tokens of these logits."""
    logits_V = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.06, 0.05, 0.04], dtype=torch.float64).log()
    kept_V = oracle(logits_V, **params) > 0
    assert (kept_V != (oracle(logits_V, other, **params) > 0)).any()
    assert sorted(set(even_draws(sample, logits_V, **params))) == kept_V.nonzero().flatten().tolist()


def test_penalty_is_that_of_transformers_for_every_token_seen(sample):
    """Prompt and output alike, each once however often it came, of either sign."""
    logits_V = torch.tensor([2.0, 1.9, -0.1, -0.15, -3.0], dtype=torch.float64)
    for tokens in ((0, 0, 0), (0, 1, 2), (2, 2, 3), (4, 0, 1)):
        for penalty in (0.5, 1.2, 3.0, 40.0):
            wanted_V = oracle(logits_V, seen=tokens, repetition_penalty=penalty)
            params = dict(tokens=tokens, prompt_len=1, repetition_penalty=penalty)
            assert tokens_of(sample(logits_V[None], [request(**params)])) == [wanted_V.argmax()]
            assert_shares(sample, logits_V, request(temperature=1.0, **params), wanted_V.tolist())


@pytest.mark.parametrize(
    ("dtype", "row", "penalty", "wanted"),
    [
        (torch.float16, [20.0, 18.1875], 1.1, 1),  # 20 / 1.1 = 18.1818
        (torch.bfloat16, [20.0, 18.25], 1.1, 1),
        (torch.float16, [20.0, 1.0], 1e-4, 0),  # 200,000 is beyond float16
    ],
    ids=str,
)
def test_penalty_is_not_rounded_to_the_precision_of_the_logits(sample, dtype, row, penalty, wanted):
    """As in Transformers, which penalises in float32: only the model's own logits are rounded."""
    asked = request(tokens=(0,), prompt_len=1, repetition_penalty=penalty)
    assert sample(torch.tensor([row], dtype=dtype), [asked]) == [Choice(wanted)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_penalty_makes_a_token_impossible(sample, temperature):
    asked = request(tokens=(0, 1, 2, 3), repetition_penalty=1e300, temperature=temperature)
    assert draws_at(sample, torch.full((4,), -3e38), [0.6], asked) == [2 if temperature else 0]


@pytest.mark.parametrize("output", range(5))
def test_stop_ids_and_no_others_are_banned_before_min_new_tokens(sample, output):
    logits_V = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    params: dict[str, Any] = dict(tokens=(1, 2) + (4,) * output, min_new_tokens=3)
    banned = output < 3
    assert set(even_draws(sample, logits_V, temperature=0.0, **params)) == ({0} if banned else {3})
    assert set(even_draws(sample, logits_V, **params)) == set(range(6)) - ({3} if banned else set())


def test_tokens_beyond_the_logits_change_nothing(sample):
    """A config may name stop ids, and have room for tokens, that the output layer does not know."""
    stops = frozenset({1, 9, -1})
    asked = request(tokens=(1, 9), stop_ids=stops, min_new_tokens=2, repetition_penalty=2.0)
    assert sample(torch.tensor([[1.0, 5.0, 3.0, 2.0]]), [asked]) == [Choice(2)]


any_request = st.builds(
    request,
    temperature=st.sampled_from([0.0, 1e-300, 1.0, 1e38, 1e300]) | st.floats(0.1, 5.0),
    top_k=st.just(0) | st.integers(0, 30),
    top_p=st.sampled_from([1e-9, 1 / 3, 0.5, 0.999, 1.0]) | st.floats(1e-3, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 1e-300, 0.5, 1.0]) | st.floats(0.0, 1.0),
    repetition_penalty=st.sampled_from([1e-9, 1.0, 1.0, 1e300]) | st.floats(0.5, 2.0),
    min_new_tokens=st.sampled_from([0, 9]),
    logprobs=st.sampled_from([None, 0, 2, 100]),
    seed=st.sampled_from([0, 2**63 - 1]) | st.integers(0, 2**63 - 1),
    tokens=st.lists(st.integers(0, V - 1), min_size=2, max_size=6),
    prompt_len=st.integers(1, 2),
    stop_ids=st.sampled_from([frozenset({3}), frozenset({0, 5, V, -1}), frozenset(range(1, V))]),
)


@given(
    st.lists(any_request, min_size=2, max_size=6), st.integers(0, 100), st.sampled_from(DTYPES), st.randoms()
)
def test_a_row_gets_alone_what_it_gets_in_any_batch(sample, requests, seed, dtype, shuffler):
    logits_RV = random_logits(len(requests), seed=seed, dtype=dtype)
    alone = [sample(logits_RV[row : row + 1], [asked])[0] for row, asked in enumerate(requests)]
    order = list(range(len(requests)))
    shuffler.shuffle(order)
    assert sample(logits_RV[order], [requests[row] for row in order]) == [alone[row] for row in order]


def test_a_draw_does_not_depend_on_the_width_of_the_batch(sample):
    """A vocabulary of real size, where a kernel may split its work otherwise for many rows than for one."""
    logits_RV = random_logits(24, 5003, dtype=torch.float32)
    requests = [request(temperature=1.0, seed=seed, top_p=0.95 if seed % 3 else 1.0) for seed in range(24)]
    alone = [sample(logits_RV[row : row + 1], [asked])[0] for row, asked in enumerate(requests)]
    assert sample(logits_RV, requests) == alone


def test_a_draw_is_keyed_by_seed_and_output_position_alone(sample):
    logits_RV = random_logits(1, 1000)
    one = request(tokens=(1, 2, 8, 8), temperature=2.0)
    other = request(tokens=(7, 7, 7, 7, 7, 9, 4), prompt_len=5, temperature=2.0)
    assert sample(logits_RV, [one]) == sample(logits_RV, [other])


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_other_positions_and_other_seeds_give_other_draws(sample, vary):
    rows = range(64)
    if vary == "position":
        requests = [request(tokens=(1, 2) + (4,) * row, temperature=1.0) for row in rows]
    else:
        requests = [request(seed=row, temperature=1.0) for row in rows]
    tokens = tokens_of(sample(torch.zeros(64, 100_000), requests))
    assert len(set(tokens)) > 60
    assert np.corrcoef(tokens[1:], tokens[:-1])[0, 1] == pytest.approx(0.0, abs=0.4)


def test_neighbouring_seeds_do_not_draw_each_others_sequences(sample):
    """Seed and position are two keys, not one sum."""
    one = [request(seed=8, tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(1, 9)]
    other = [request(seed=9, tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(8)]
    tokens = [tokens_of(sample(torch.zeros(8, 100_000), requests)) for requests in (one, other)]
    assert not set(tokens[0]) & set(tokens[1])


def test_draws_along_a_sequence_follow_the_distribution(sample):
    logits_V = random_logits(1, seed=6)[0]
    requests = [request(tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(DRAWS // 2)]
    tokens = tokens_of(sample(logits_V.expand(len(requests), -1), requests))
    assert_drawn_from(oracle(logits_V, temperature=1.0), torch.tensor(tokens).bincount(minlength=V))
