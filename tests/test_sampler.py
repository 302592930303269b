"""The sampler: every draw is legal, as likely as it should be, and nobody's business but its own request's.

R rows (requests), V vocabulary. Transformers' own warpers say which tokens may be drawn and how likely each
one is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.request import Request, SamplingParams
from engine.sampling import device as sampler
from engine.step import Choice

V = 24
DRAWS = 2000
sample = sampler.sample
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module", autouse=True, params=["sample", "sample_together"])
def either_way(request):
    """All of these hold a row at a time, as on a CPU, and all rows at once, as on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.sample", getattr(sampler, request.param))
        yield


def request(*, seed: int = 5, tokens: tuple[int, ...] = (1, 2), prompt_len: int = 2, **params) -> Request:
    return Request("a", prompt_len, SamplingParams(**params), list(tokens), frozenset({3}), seed)


def random_logits(
    rows: int, columns: int = V, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def tokens_of(choices: list[Choice]) -> list[int]:
    assert all(choice.error is None and choice.token is not None for choice in choices)
    return [choice.token for choice in choices if choice.token is not None]


def drawn(logits_V: torch.Tensor, count: int = DRAWS, **params) -> torch.Tensor:
    """How often each token comes up in `count` draws that differ in their seed alone."""
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
def test_greedy_takes_the_most_likely_token(dtype):
    logits_RV = random_logits(50, 1000, dtype=dtype)
    assert tokens_of(sample(logits_RV, [request()] * 50)) == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("row", "first"), [([0, 1, 2, 2, 2], 2), ([7, 7, 7, 7, 7], 0), ([0, -1, 0, -1, -1], 0)]
)
def test_greedy_takes_the_first_of_equals(dtype, row, first):
    logits_RV = torch.tensor([row, row], dtype=dtype).repeat(1, 20)
    assert tokens_of(sample(logits_RV, [request(), request()])) == [first, first]


@pytest.mark.parametrize("vocab", [50_257, 49_152, 151_936, 512, 64])
def test_the_largest_of_any_vocabulary_is_found_and_so_is_nan(vocab):
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    for row, at in enumerate([0, 63, vocab - 1]):
        logits[row, [at, -1]] = 100.0
    logits[3, 40], logits[4, 40] = torch.nan, torch.inf
    choices = sample(logits, [request() for _ in range(9)])
    assert [choices[3].token, choices[4].token] == [None, None]
    assert [choice.token for choice in choices[:3]] == [0, 63, vocab - 1]
    assert [choice.token for choice in choices[5:]] == logits[5:].argmax(-1).tolist()


def test_greedy_ignores_filters_and_seed():
    logits_RV = random_logits(2)
    requests = [request(top_k=2, top_p=0.3, min_p=0.5, seed=seed) for seed in (1, 2)]
    assert tokens_of(sample(logits_RV, requests)) == logits_RV.argmax(-1).tolist()


def test_no_requests_give_no_choices():
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
def test_draws_follow_transformers(params):
    logits_V = random_logits(1, seed=3)[0]
    assert_drawn_from(oracle(logits_V, **params), drawn(logits_V, **params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_follow_logits_of_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randperm(V, generator=generator).to(dtype) / 4  # exact in every dtype, and no ties
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
    assert_drawn_from(oracle(logits_V, **params), drawn(logits_V, **params))


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
def test_filters_apply_in_the_stated_order(params, other):
    """Temperature, min_p, top_k, top_p; `other` is an order that would keep other tokens of these logits."""
    logits_V = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.06, 0.05, 0.04], dtype=torch.float64).log()
    right_V = oracle(logits_V, **params)
    assert ((right_V > 0) != (oracle(logits_V, other, **params) > 0)).any()
    counts_V = drawn(logits_V, **params)
    assert ((counts_V > 0) == (right_V > 0)).all()


@given(
    st.integers(0, 1000),
    st.floats(0.1, 5.0),
    st.integers(0, 30),
    st.floats(1e-3, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.5, 2.0),
)
def test_any_draw_is_among_the_tokens_transformers_keeps(seed, temperature, top_k, top_p, min_p, penalty):
    logits_V = random_logits(1, seed=seed)[0]
    params: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    }
    params |= {"top_k": top_k} if top_k else {}
    counts_V = drawn(logits_V, 40, **params)
    assert counts_V[oracle(logits_V, **params) == 0].sum() == 0


def test_tokens_of_probability_zero_are_never_drawn():
    logits_V = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    counts_V = drawn(logits_V, 500, temperature=2.0, top_p=0.99, min_p=0.01, top_k=4)
    assert (counts_V > 0).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 1e-308, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits_RV = random_logits(20)
    requests = [request(temperature=temperature, seed=seed) for seed in range(20)]
    assert tokens_of(sample(logits_RV, requests)) == logits_RV.argmax(-1).tolist()


def test_penalty_is_that_of_transformers_for_every_token_seen():
    """Prompt and output alike, each once however often it came, of either sign."""
    logits_V = torch.tensor([2.0, 1.9, -0.1, -0.15, -3.0], dtype=torch.float64)
    for tokens in ((0, 0, 0), (0, 1, 2), (2, 2, 3), (4, 0, 1)):
        for penalty in (0.5, 1.2, 3.0, 40.0):
            wanted = oracle(logits_V, seen=tokens, repetition_penalty=penalty).argmax()
            asked = request(tokens=tokens, prompt_len=1, repetition_penalty=penalty)
            assert tokens_of(sample(logits_V[None], [asked])) == [wanted]


@pytest.mark.parametrize(
    ("dtype", "row", "penalty", "wanted"),
    [
        (torch.float16, [20.0, 18.1875], 1.1, 1),  # 20 / 1.1 = 18.1818
        (torch.bfloat16, [20.0, 18.25], 1.1, 1),
        (torch.float16, [20.0, 1.0], 1e-4, 0),  # 200,000 is beyond float16
    ],
    ids=str,
)
def test_penalty_is_not_rounded_to_the_precision_of_the_logits(dtype, row, penalty, wanted):
    """As in Transformers, which penalises in float32: only the model's own logits are rounded."""
    asked = request(tokens=(0,), prompt_len=1, repetition_penalty=penalty)
    assert sample(torch.tensor([row], dtype=dtype), [asked])[0] == Choice(wanted)


any_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 3, 100]),
        "top_p": st.sampled_from([0.2, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.4]),
        "min_new_tokens": st.sampled_from([0, 9]),
        "logprobs": st.sampled_from([None, 0, 2]),
    }
)
any_request = st.builds(
    lambda params, seed, tokens, prompt_len: request(
        seed=seed, tokens=tokens, prompt_len=prompt_len, **params
    ),
    any_params,
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, V - 1), min_size=2, max_size=6).map(tuple),
    st.integers(1, 2),
)


@given(
    st.lists(any_request, min_size=2, max_size=6), st.integers(0, 100), st.sampled_from(DTYPES), st.randoms()
)
def test_a_row_gets_alone_what_it_gets_in_any_batch(requests, seed, dtype, shuffler):
    logits_RV = random_logits(len(requests), seed=seed, dtype=dtype)
    alone = [sample(logits_RV[row : row + 1], [asked])[0] for row, asked in enumerate(requests)]
    order = list(range(len(requests)))
    shuffler.shuffle(order)
    assert sample(logits_RV[order], [requests[row] for row in order]) == [alone[row] for row in order]


def test_a_draw_does_not_depend_on_the_width_of_the_batch():
    """A vocabulary of real size, where a kernel may split its work otherwise for many rows than for one."""
    logits_RV = random_logits(24, 5003, dtype=torch.float32)
    requests = [request(temperature=1.0, seed=seed, top_p=0.95 if seed % 3 else 1.0) for seed in range(24)]
    alone = [sample(logits_RV[row : row + 1], [asked])[0] for row, asked in enumerate(requests)]
    assert sample(logits_RV, requests) == alone


def test_a_draw_is_keyed_by_seed_and_output_position_alone():
    logits_RV = random_logits(1, 1000)
    one = request(tokens=(1, 2, 8, 8), temperature=2.0)
    other = request(tokens=(7, 7, 7, 7, 7, 9, 4), prompt_len=5, temperature=2.0)
    assert sample(logits_RV, [one]) == sample(logits_RV, [other])


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_other_positions_and_other_seeds_give_other_draws(vary):
    rows = range(64)
    if vary == "position":
        requests = [request(tokens=(1, 2) + (4,) * row, temperature=1.0) for row in rows]
    else:
        requests = [request(seed=row, temperature=1.0) for row in rows]
    tokens = tokens_of(sample(torch.zeros(64, 100_000), requests))
    assert len(set(tokens)) > 60
    assert np.corrcoef(tokens[1:], tokens[:-1])[0, 1] == pytest.approx(0.0, abs=0.4)


def test_neighbouring_seeds_do_not_draw_each_others_sequences():
    """Seed and position are two keys, not one sum."""
    one = [request(seed=8, tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(1, 9)]
    other = [request(seed=9, tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(8)]
    tokens = [tokens_of(sample(torch.zeros(8, 100_000), requests)) for requests in (one, other)]
    assert not set(tokens[0]) & set(tokens[1])


def test_draws_along_a_sequence_follow_the_distribution():
    logits_V = random_logits(1, seed=6)[0]
    requests = [request(tokens=(1, 2) + (4,) * position, temperature=1.0) for position in range(DRAWS // 2)]
    tokens = tokens_of(sample(logits_V.expand(len(requests), -1), requests))
    assert_drawn_from(oracle(logits_V, temperature=1.0), torch.tensor(tokens).bincount(minlength=V))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("output", "banned"), [(0, True), (2, True), (3, False), (4, False)])
def test_stop_ids_cannot_be_drawn_before_min_new_tokens(temperature, output, banned):
    logits_V = torch.zeros(V)
    logits_V[3] = 30.0
    asked: dict[str, Any] = {
        "tokens": (1, 2) + (4,) * output,
        "min_new_tokens": 3,
        "temperature": temperature,
    }
    assert drawn(logits_V, 50, **asked)[3] == (0 if banned else 50)


def test_only_stop_ids_are_banned():
    counts_V = drawn(torch.zeros(6), 400, min_new_tokens=1, temperature=1.0)
    assert (counts_V > 0).tolist() == [True, True, True, False, True, True]


@example(2**63 - 1)
@given(st.integers(0, 2**63 - 1))
def test_every_legal_seed_draws_the_same_twice(seed):
    logits_RV = random_logits(1)
    asked = request(seed=seed, temperature=1.0)
    assert tokens_of(sample(logits_RV, [asked])) == tokens_of(sample(logits_RV, [asked]))
