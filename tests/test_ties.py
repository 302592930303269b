"""Tokens have one rank, equals by the lower id, and it decides what filters keep; and the rules as a whole.

R rows (requests), V vocabulary. The reference sorts and sums in plain Python.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from engine import Engine, EngineConfig, SamplingParams, sampling
from engine.request import Request
from engine.sampling import rules
from engine.sampling.device import sample_together
from engine.step import ALL_BANNED, NON_FINITE
from tests.test_sampler import (
    DTYPES,
    any_request,
    assert_shares,
    draws_at,
    even_draws,
    random_logits,
    request,
)

LAST = math.nextafter(1.0, 0.0)  # the largest number that chance may give
LARGEST = torch.finfo(torch.float64).max
many_examples = settings(max_examples=5 * settings().max_examples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_top_k_keeps_exactly_k_the_lower_ids_of_equals(sample, dtype, top_k):
    logits_V = torch.tensor([1.0, 0.5, 2.0, 1.0, 2.0, 1.0, -3.0], dtype=dtype)
    assert sorted(set(even_draws(sample, logits_V, top_k=top_k))) == sorted([2, 4, 0, 3, 5][:top_k])


def test_draws_among_equals_are_even(sample):
    draws = even_draws(sample, torch.zeros(8), 64, top_k=4)
    assert [draws.count(token) for token in range(8)] == [16] * 4 + [0] * 4


@pytest.mark.parametrize("equals", [2, 3, 7, 10, 20])
def test_top_p_keeps_the_fewest_of_equals(sample, equals):
    """For k of n equals it takes p = k / n, however that rounds."""
    logits_V = torch.tensor([-50.0, *[4.0] * equals], dtype=torch.float64)
    for kept in range(1, equals + 1):
        share = kept / equals
        for top_p in {share, math.nextafter(share, 0), math.nextafter(share, 1)}:
            if top_p < 1:
                draws = even_draws(sample, logits_V, 2 * equals, top_p=top_p)
                assert sorted(set(draws)) == list(range(1, 1 + kept)), top_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.40001}, [0, 1]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.5}, [0, 1, 2, 3]),
        ({"min_p": 0.50001}, [1]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.75}, [0, 1]),  # 0.6 of the 0.8 that are left
        ({"top_k": 2, "min_p": 0.5}, [0, 1]),
    ],
    ids=str,
)
def test_sums_are_those_of_the_probabilities_meant(sample, dtype, params, kept):
    """Logits are rounded, and their probabilities a little off 0.2 and 0.4: no filter turns on that."""
    logits_V = torch.tensor([0.2, 0.4, 0.2, 0.2], dtype=dtype).log()
    assert sorted(set(even_draws(sample, logits_V, **params))) == kept


def test_min_p_keeps_all_that_are_as_likely_as_it_asks(sample):
    assert set(even_draws(sample, torch.tensor([3.0, 1.0, 3.0, 2.9]), min_p=1.0)) == {0, 2}


@pytest.mark.parametrize("size", [5, 300, 5000])
def test_the_first_of_many_equals_in_a_vocabulary_of_any_size(sample, size):
    """At a temperature that makes all tokens weigh the same, a draw is a place among those that are kept."""
    logits_V = torch.randint(4, (size,), generator=torch.Generator().manual_seed(size)).float()
    order = ranked(logits_V.tolist())
    chances = [(step + 0.5) / 16 for step in range(16)]
    for top_k in (1, 2, size // 3, size - 1, size, size + 1):
        kept = sorted(order[:top_k])
        tokens = draws_at(sample, logits_V, chances, request(temperature=1e300, top_k=top_k))
        assert tokens == [kept[int(chance * len(kept))] for chance in chances]


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


def ranked(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def penalised(logits: list[float], asked: Request) -> list[float]:
    """Logits after penalty and bans, by the definitions."""
    scores, penalty = list(logits), asked.params.repetition_penalty
    for token in set(asked.tokens) & set(range(len(logits))):
        if logits[token] > -math.inf and penalty != 1:
            changed = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            scores[token] = max(-LARGEST, min(LARGEST, changed))
    return [-math.inf if token in asked.banned else score for token, score in enumerate(scores)]


def weights_of(scores: list[float], params: SamplingParams) -> list[float]:
    """What each token weighs, 0 where a filter drops it: by the definitions, one after the other."""
    peak, slack = max(scores), 1 - rules.ROUNDING
    weights = [math.exp(max(-1e4, (x - peak) / params.temperature)) if x > -math.inf else 0.0 for x in scores]
    weights = [0.0 if weight < params.min_p * slack else weight for weight in weights]
    order = ranked(scores)
    for token in order[params.top_k or len(scores) :]:
        weights[token] = 0.0
    if params.top_p < 1:
        total = math.fsum(weights)
        for place, token in reversed(list(enumerate(order))):
            if math.fsum(weights[other] for other in order[:place]) >= params.top_p * slack * total:
                weights[token] = 0.0
    return weights


@pytest.mark.parametrize("params", [{}, {"top_k": 200}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_the_largest_chance_draws_the_last_token_that_is_kept(sample, params):
    """However the sums of weights round."""
    asked = request(temperature=1.0, **params)
    for seed in range(20):
        logits_V = random_logits(1, 300, seed=seed)[0]
        logits_V[290:] = -torch.inf
        weights = weights_of(logits_V.tolist(), asked.params)
        last = max(token for token, weight in enumerate(weights) if weight > 0)
        assert draws_at(sample, logits_V, [LAST], asked) == [last]


TIES_AND_EXTREMES = [0.0, -0.0, 1.0, 1.0, 2.5, -1.0, 1e-30, 88.0, 700.0, -6e4, 6e4, -math.inf, -math.inf]
TIES_AND_EXTREMES += [3e38, -3e38, 1e308, -1e308]
finite = st.sampled_from(TIES_AND_EXTREMES) | st.floats(-30, 30)
broken = st.lists(finite | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=20)


@st.composite
def rows_of_logits(draw, most_rows: int) -> torch.Tensor:
    """Logits [R, V] of any dtype, of every size and with ties; most rows are as they should be."""
    dtype, size = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20))
    limit = torch.finfo(dtype).max
    rows = []
    for _ in range(draw(st.integers(1, most_rows))):
        row = draw(st.lists(finite, min_size=size, max_size=size))
        if draw(st.integers(0, 5)) == 5:
            row = (draw(broken) + row)[:size]
        rows.append([math.copysign(min(abs(x), limit), x) if math.isfinite(x) else x for x in row])
    return torch.tensor(rows, dtype=dtype)


@many_examples
@given(rows_of_logits(6), st.lists(any_request, min_size=6, max_size=6))
def test_both_implementations_choose_the_same(logits_RV, requests):
    requests = requests[: len(logits_RV)]
    pairs = zip(sampling.sample(logits_RV, requests), sample_together(logits_RV, requests), strict=True)
    for one, other in pairs:
        assert (one.token, one.error) == (other.token, other.error)
        if one.logprob is None or other.logprob is None:
            assert one.logprob is other.logprob
            continue
        assert [token for token, _ in one.logprob.top] == [token for token, _ in other.logprob.top]
        values = [[c.logprob.logprob, *(value for _, value in c.logprob.top)] for c in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-12, abs=1e-12)


@many_examples
@given(rows_of_logits(1), any_request, st.lists(st.floats(0, 1, exclude_max=True), max_size=3))
def test_choices_are_those_of_the_definitions(sample, logits_RV, asked, chances):
    logits, params = logits_RV[0].double().tolist(), asked.params
    scores, order = penalised(logits, asked), ranked(logits)
    (choice,) = sample(logits_RV, [asked])
    if any(map(math.isnan, logits)) or math.isinf(max(logits)):
        assert choice == NON_FINITE
        return
    if max(scores) == -math.inf:
        assert choice == ALL_BANNED
        return
    if params.logprobs is not None:
        norm = math.log(math.fsum(math.exp(x - max(logits)) for x in logits))
        logprobs = [x - max(logits) - norm for x in logits]
        assert choice.logprob.logprob == pytest.approx(logprobs[choice.token], rel=1e-12, abs=1e-12)
        tokens, values = zip(*choice.logprob.top, strict=True) if params.logprobs else ((), ())
        assert list(tokens) == order[: params.logprobs]
        assert values == pytest.approx([logprobs[token] for token in tokens], rel=1e-12, abs=1e-12)
    if params.temperature == 0:
        assert choice.token == ranked(scores)[0]
        return
    weights = weights_of(scores, params)
    assert all(weights[token] > 0 for token in draws_at(sample, logits_RV[0], [0.0, LAST, *chances], asked))
    assert_shares(sample, logits_RV[0], asked, weights)
