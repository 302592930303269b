"""Equal logits: one rank of tokens, the lower id first, decides in every filter, on every path, what stays.

R rows (requests), V vocabulary. The reference sorts in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from engine import Engine, EngineConfig, SamplingParams
from engine.request import Request
from engine.sampling import device as sampler, host as choose, rules
from engine.step import Choice
from tests.test_sampler import DTYPES, drawn, request, tokens_of

WAYS = {"a row at a time": sampler.sample, "all rows at once": sampler.sample_together}
ways = pytest.mark.parametrize("sample", WAYS.values(), ids=WAYS)


def chosen(sample: Any, logits_V: torch.Tensor, asked: list[Request], chances: Sequence[float] = ()) -> Any:
    """What requests get of one row of logits, with these numbers for chance if there are any."""
    given_out = iter(chances)
    with pytest.MonkeyPatch.context() as patch:
        for module in (rules,) if chances else ():
            patch.setattr(module, "uniform", lambda seed, position: next(given_out))
        return sample(logits_V.expand(len(asked), -1), asked)


def found(sample: Any, logits_V: torch.Tensor, count: int = 64, **params) -> list[int]:
    """Every token that comes up in `count` even steps of chance: all that are likelier than one step."""
    chances = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).tolist()
    asked = [request(**{"temperature": 1.0, **params}) for _ in chances]
    return sorted(set(tokens_of(chosen(sample, logits_V, asked, chances))))


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_top_k_keeps_exactly_k_the_lower_ids_of_equals(sample, dtype, top_k):
    logits_V = torch.tensor([1.0, 0.5, 2.0, 1.0, 2.0, 1.0, -3.0], dtype=dtype)
    assert found(sample, logits_V, top_k=top_k) == sorted([2, 4, 0, 3, 5][:top_k])


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_tied_tokens_is_the_same_whatever_the_seed(sample, dtype):
    logits_V = torch.tensor([0.0, 7.0, 7.0, 7.0], dtype=dtype)
    asked = [request(seed=seed, temperature=1.3, top_k=1) for seed in range(30)]
    assert set(tokens_of(chosen(sample, logits_V, asked))) == {1}


@ways
@pytest.mark.parametrize("equals", [2, 3, 7, 10, 20])
def test_top_p_keeps_the_fewest_of_equals(sample, equals):
    """For k of n equals it takes p = k / n, however that rounds."""
    logits_V = torch.tensor([-50.0, *[4.0] * equals], dtype=torch.float64)
    for kept in range(1, equals + 1):
        share = kept / equals
        for top_p in {share, math.nextafter(share, 0), math.nextafter(share, 1)}:
            if top_p < 1:
                assert found(sample, logits_V, 2 * equals, top_p=top_p) == list(range(1, 1 + kept)), top_p


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.41}, [0, 1]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.5}, [0, 1, 2, 3]),
        ({"min_p": 0.51}, [1]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.75}, [0, 1]),  # 0.6 of the 0.8 that are left
        ({"top_k": 2, "min_p": 0.5}, [0, 1]),
    ],
    ids=str,
)
def test_sums_are_those_of_the_probabilities_meant(sample, dtype, params, kept):
    """Logits are rounded, and their probabilities a little off 0.2 and 0.4: no filter turns on that."""
    logits_V = torch.tensor([0.2, 0.4, 0.2, 0.2], dtype=dtype).log()
    assert found(sample, logits_V, **params) == kept


@ways
def test_min_p_keeps_all_that_are_as_likely_as_it_asks(sample):
    assert found(sample, torch.tensor([3.0, 1.0, 3.0, 2.9]), min_p=1.0) == [0, 2]


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 99])
def test_alternatives_at_a_tie_are_the_lower_ids(sample, dtype, count):
    logits_V = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0], dtype=dtype)
    (choice,) = chosen(sample, logits_V, [request(logprobs=count)])
    assert [token for token, _ in choice.logprob.top] == [1, 3, 0, 2, 4, 5][:count]


@pytest.mark.parametrize("best", [choose._first_of, None])
@pytest.mark.parametrize("size", [5, 300, 5000])
def test_the_first_of_many_equals_in_a_vocabulary_of_any_size(best, size):
    logits_V = np.random.default_rng(size).integers(0, 4, size).astype(np.float32)
    order = sorted(range(size), key=lambda token: (-logits_V[token], token))
    if best is None:
        for sample in WAYS.values():
            assert found(sample, torch.from_numpy(logits_V), top_k=1) == order[:1]
            assert chosen(sample, torch.from_numpy(logits_V), [request()]) == [Choice(order[0])]
        return
    for count in (0, 1, 2, size // 3, size - 1, size, size + 1):
        assert best(logits_V, count).tolist() == sorted(order[:count])


def ranked(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def weights_of(logits: list[float], asked: SamplingParams) -> list[float]:
    """What each token weighs, 0 where a filter drops it: by the definitions, one after the other."""
    peak = max(logits)
    slack = rules.ENOUGH
    weights = [math.exp(max(-1e4, (x - peak) / asked.temperature)) if x > -math.inf else 0.0 for x in logits]
    weights = [0.0 if weight < asked.min_p * slack else weight for weight in weights]
    order = ranked(logits)
    for token in order[asked.top_k or len(logits) :]:
        weights[token] = 0.0
    if asked.top_p < 1:
        total = math.fsum(weights)
        for place, token in reversed(list(enumerate(order))):
            if math.fsum(weights[other] for other in order[:place]) >= asked.top_p * slack * total:
                weights[token] = 0.0
    return weights


VALUES = [
    0.0,
    -0.0,
    1.0,
    1.0,
    2.5,
    -1.0,
    1e-30,
    88.0,
    700.0,
    -6e4,
    6e4,
    -math.inf,
    -math.inf,
    3e38,
    -3e38,
    1e308,
    -1e308,
]


@settings(max_examples=5 * settings().max_examples)
@given(
    values=st.lists(st.sampled_from(VALUES), min_size=1, max_size=20),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 1.0, 1.7, 50.0, 1e38, 1e300]),
    top_k=st.integers(0, 22),
    top_p=st.sampled_from([1e-9, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-300, 0.1, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 1.0, 1e-9, 0.5, 1.3, 1e9, 1e300]),
    least=st.sampled_from([0, 9]),
    chances=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
)
def test_both_samplers_agree_and_keep_what_the_definitions_keep(
    values, dtype, temperature, top_k, top_p, min_p, penalty, least, chances
):
    most = torch.finfo(dtype).max
    logits_V = torch.tensor([max(-most, min(most, x)) if x > -math.inf else x for x in values], dtype=dtype)
    logits = logits_V.double().tolist()
    assume(max(logits) > -math.inf)
    params = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    more = dict(repetition_penalty=penalty, tokens=(1, 2, 5), min_new_tokens=least, logprobs=3)
    asked = [request(**params, **more) for _ in chances]
    one, other = (chosen(sample, logits_V, asked, chances) for sample in WAYS.values())
    for a, b in zip(one, other, strict=True):
        assert (a.token, a.error) == (b.token, b.error)
        if a.error is not None:
            assert least
            assert set(range(len(logits))) - {3} <= {i for i, x in enumerate(logits) if x == -math.inf}
            continue
        for choice in (a, b):
            assert [token for token, _ in choice.logprob.top] == ranked(logits)[:3]
        numbers = ([c.logprob.logprob, *(value for _, value in c.logprob.top)] for c in (a, b))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-12, abs=1e-12)
    if penalty != 1.0 or least or one[0].error:
        return
    if temperature == 0:
        assert {choice.token for choice in one} == {ranked(logits)[0]}
        return
    weights = weights_of(logits, asked[0].params)
    assert all(weights[choice.token] > 0 for choice in one)
    kept = [token for token, weight in enumerate(weights) if weight > 1e-6]
    total = math.fsum(weights)
    middles = [(math.fsum(weights[:token]) + weights[token] / 2) / total for token in kept]
    every = [request(**params) for _ in kept]
    assert tokens_of(chosen(sampler.sample, logits_V, every, middles)) == kept


@ways
def test_tokens_beyond_the_logits_change_nothing(sample):
    """A config may name stop ids, and have room for tokens, that the output layer does not know."""
    params = SamplingParams(min_new_tokens=2, repetition_penalty=2.0)
    asked = Request("a", 2, params, [1, 9], frozenset({1, 9, -1}), 0)
    assert sample(torch.tensor([[1.0, 5.0, 3.0, 2.0]]), [asked]) == [Choice(2)]


@ways
def test_no_token_left_is_an_error_of_its_request_alone(sample):
    logits_RV = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]]).repeat(2, 1)
    barred = Request("a", 1, SamplingParams(min_new_tokens=1), [0], frozenset({1, 3}), 0)
    one, other = sample(logits_RV, [barred, request()])
    assert one.token is None
    assert "min_new_tokens bars every token" in one.error
    assert other == Choice(1)


@ways
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_penalty_makes_a_token_impossible(sample, temperature):
    logits_V = torch.full((4,), -3e38)
    asked = [request(tokens=(0, 1, 2, 3), repetition_penalty=1e300, temperature=temperature)]
    assert chosen(sample, logits_V, asked, [0.6])[0].error is None


@pytest.mark.parametrize("config", [dict(runner="padded", policy="dynamic"), dict(runner="packed")], ids=str)
def test_top_k_of_one_is_greedy_in_bfloat16(tiny, config):
    """Logits of 8 bits tie all the time; whatever the seed, the first of the largest is taken."""
    oracle = tiny("tiny-llama", "bfloat16")
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8, **config))
    prompts = [[5, 9, 100, 7 + i] for i in range(4)]
    greedy = engine.generate(prompts, SamplingParams(24, ignore_eos=True), progress=False)
    for seed in range(6):
        params = SamplingParams(24, ignore_eos=True, temperature=1.0, top_k=1, seed=seed)
        for one, other in zip(engine.generate(prompts, params, progress=False), greedy, strict=True):
            assert one.token_ids == other.token_ids


@ways
def test_draws_among_all_equals_are_even(sample, monkeypatch):
    monkeypatch.setattr("tests.test_sampler.sample", sample)
    counts_V = drawn(torch.zeros(8), 4000, temperature=1.0, top_k=4)
    assert counts_V[4:].sum() == 0
    assert counts_V[:4].min() > 850
