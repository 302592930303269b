"""What the sampler says of a row besides its token: an error for broken logits, and log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.sampling import device as sampler
from engine.step import Choice
from tests.test_sampler import DTYPES, V, random_logits, request, tokens_of

sample = sampler.sample


@pytest.fixture(scope="module", autouse=True, params=["sample", "sample_together"])
def either_way(request):
    """All of these hold a row at a time, as on a CPU, and all rows at once, as on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.sample", getattr(sampler, request.param))
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", ["one nan", "all nan", "all -inf", "one +inf", "all +inf", "nan and -inf"])
def test_a_broken_row_fails_alone(dtype, temperature, bad):
    logits_RV = random_logits(3, dtype=dtype)
    value = torch.nan if "nan" in bad else torch.inf if "+" in bad else -torch.inf
    if bad == "nan and -inf":
        logits_RV[1] = -torch.inf
    logits_RV[1, 7 if "all" not in bad else slice(None)] = value
    requests = [
        request(temperature=temperature, top_k=5, top_p=0.9, min_p=0.01, seed=seed, logprobs=2)
        for seed in range(3)
    ]
    choices = sample(logits_RV, requests)
    assert choices[1].token is None
    assert choices[1].error is not None
    assert choices[1].logprob is None
    for row in (0, 2):
        assert choices[row] == sample(logits_RV[row : row + 1], [requests[row]])[0]
        assert choices[row].error is None


@pytest.mark.parametrize("params", [{"min_new_tokens": 1}, {"repetition_penalty": 2.0}], ids=str)
def test_a_nan_is_an_error_wherever_it_is(params):
    """Even at a token that is banned, or that a penalty changes."""
    for token in (1, 3):
        logits_RV = random_logits(1)
        logits_RV[0, token] = torch.nan
        assert sample(logits_RV, [request(**params)])[0].token is None


def test_some_tokens_at_minus_infinity_are_no_error():
    logits_RV = torch.full((1, V), -torch.inf)
    logits_RV[0, 5] = 1.0
    assert sample(logits_RV, [request(temperature=1.0, top_p=0.5)]) == [Choice(5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_those_of_the_raw_logits(dtype):
    """Whatever penalty, ban, temperature or filter decided the draw."""
    logits_RV = random_logits(30, dtype=dtype)
    params: dict[str, Any] = {
        "temperature": 2.0,
        "top_k": 4,
        "repetition_penalty": 1.7,
        "min_new_tokens": 5,
        "logprobs": 0,
    }
    choices = sample(logits_RV, [request(seed=seed, **params) for seed in range(30)])
    wanted_RV = logits_RV.double().log_softmax(-1)
    for row, (choice, token) in enumerate(zip(choices, tokens_of(choices), strict=True)):
        assert choice.logprob is not None
        assert choice.logprob.token_id == token
        assert choice.logprob.logprob == pytest.approx(float(wanted_RV[row, token]), abs=1e-12)
        assert choice.logprob.top == ()


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_alternatives_are_the_most_likely_best_first(count):
    logits_RV = random_logits(4)
    for row, choice in enumerate(sample(logits_RV, [request(logprobs=count)] * 4)):
        assert choice.logprob is not None
        ranked = logits_RV[row].log_softmax(-1).sort(descending=True)
        assert [token for token, _ in choice.logprob.top] == ranked.indices[:count].tolist()
        assert [value for _, value in choice.logprob.top] == pytest.approx(
            ranked.values[:count].tolist(), abs=1e-12
        )


def test_logprobs_only_for_those_who_ask():
    choices = sample(random_logits(3), [request(), request(logprobs=1), request()])
    assert [choice.logprob is None for choice in choices] == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_not_modified(dtype):
    logits_RV = random_logits(2, dtype=dtype)
    before_RV = logits_RV.clone()
    params: dict[str, Any] = {
        "top_k": 2,
        "top_p": 0.5,
        "min_p": 0.2,
        "repetition_penalty": 1.5,
        "min_new_tokens": 4,
        "logprobs": 3,
    }
    for temperature in (0.0, 1.0):
        sample(logits_RV, [request(temperature=temperature), request(temperature=temperature, **params)])
        assert torch.equal(logits_RV, before_RV)
