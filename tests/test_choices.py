"""What the sampler says of a row besides its token: an error for broken logits, and log-probabilities."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from engine import sampling
from engine.sampling import rules
from engine.step import ALL_BANNED, NON_FINITE, Choice
from tests.test_sampler import DTYPES, V, random_logits, request, tokens_of


def test_the_sampler_runs_where_the_logits_are(monkeypatch):
    monkeypatch.setattr("engine.sampling.device.sample_together", lambda logits_RV, requests: ["there"])
    assert sampling.sample(torch.empty(1, V, device="meta"), [request()]) == ["there"]
    assert sampling.sample(random_logits(1), [request()]) != ["there"]


def test_the_implementation_on_the_host_needs_no_torch():
    probe = "import sys, engine.sampling.host; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", ["one nan", "all nan", "all -inf", "one +inf", "all +inf", "nan and -inf"])
def test_a_broken_row_fails_alone(sample, dtype, temperature, bad):
    logits_RV = random_logits(3, dtype=dtype)
    value = torch.nan if "nan" in bad else torch.inf if "+" in bad else -torch.inf
    if bad == "nan and -inf":
        logits_RV[1] = -torch.inf
    logits_RV[1, 7 if "all" not in bad else slice(None)] = value
    params = dict(temperature=temperature, top_k=5, top_p=0.9, min_p=0.01, logprobs=2)
    requests = [request(seed=seed, **params) for seed in range(3)]
    choices = sample(logits_RV, requests)
    assert choices[1] == NON_FINITE
    for row in (0, 2):
        assert choices[row] == sample(logits_RV[row : row + 1], [requests[row]])[0]
        assert choices[row].error is None


@pytest.mark.parametrize("params", [{"min_new_tokens": 1}, {"repetition_penalty": 2.0}], ids=str)
@pytest.mark.parametrize("token", [1, 3])
def test_a_nan_is_an_error_even_at_a_token_that_is_banned_or_penalised(sample, token, params):
    logits_RV = random_logits(1)
    logits_RV[0, token] = torch.nan
    assert sample(logits_RV, [request(**params)]) == [NON_FINITE]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}], ids=str)
def test_no_token_left_is_an_error_of_its_request_alone(sample, params):
    """No penalty brings a token back that the model rules out."""
    logits_RV = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]]).repeat(2, 1)
    barred = request(min_new_tokens=1, stop_ids=frozenset({1, 3}), **params)
    assert sample(logits_RV, [barred, request()]) == [ALL_BANNED, Choice(1)]
    assert "min_new_tokens bars every token" in ALL_BANNED.error


def test_what_raises_on_the_host_is_an_error_of_its_request_alone(monkeypatch):
    def uniform(seed: int, position: int) -> float:
        return [0.5, 0.5][seed]

    monkeypatch.setattr(rules, "uniform", uniform)
    requests = [request(temperature=1.0, seed=seed) for seed in (0, 2, 1)]
    choices = sampling.sample(random_logits(1).expand(3, -1), requests)
    assert choices[1] == Choice(None, error="IndexError('list index out of range')")
    assert choices[0] == choices[2] == Choice(tokens_of(choices[:1])[0])


def test_tokens_at_minus_infinity_are_no_error_and_never_drawn(sample):
    logits_V = torch.full((V,), -torch.inf)
    logits_V[[5, 9]] = 1.0
    params = dict(temperature=2.0, top_p=0.99, min_p=0.01, top_k=4)
    choices = sample(logits_V.expand(500, -1), [request(seed=seed, **params) for seed in range(500)])
    assert set(tokens_of(choices)) == {5, 9}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_those_of_the_raw_logits(sample, dtype):
    """Whatever penalty, ban, temperature or filter decided the draw."""
    logits_RV = random_logits(30, dtype=dtype)
    params: dict[str, Any] = dict(temperature=2.0, top_k=4, repetition_penalty=1.7, min_new_tokens=5)
    choices = sample(logits_RV, [request(seed=seed, logprobs=0, **params) for seed in range(30)])
    wanted_RV = logits_RV.double().log_softmax(-1)
    for row, (choice, token) in enumerate(zip(choices, tokens_of(choices), strict=True)):
        assert choice.logprob is not None
        assert choice.logprob.token_id == token
        assert choice.logprob.logprob == pytest.approx(float(wanted_RV[row, token]), abs=1e-12)
        assert choice.logprob.top == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 99])
def test_alternatives_are_the_most_likely_best_first_and_of_equals_the_lower_id(sample, dtype, count):
    logits_V = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 0.5], dtype=dtype)
    (choice,) = sample(logits_V[None], [request(logprobs=count)])
    assert [token for token, _ in choice.logprob.top] == [1, 3, 0, 2, 4, 5, 6][:count]
    wanted_V = logits_V.double().log_softmax(-1).sort(descending=True).values
    assert [value for _, value in choice.logprob.top] == pytest.approx(wanted_V[:count].tolist(), abs=1e-12)


def test_logprobs_only_for_those_who_ask(sample):
    choices = sample(random_logits(3), [request(), request(logprobs=1), request()])
    assert [choice.logprob is None for choice in choices] == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5}, {"min_new_tokens": 4}], ids=str)
def test_logits_are_not_modified(sample, dtype, temperature, params):
    logits_RV = random_logits(2, dtype=dtype)
    before_RV = logits_RV.clone()
    filters = dict(temperature=temperature, top_k=2, top_p=0.5, min_p=0.2, logprobs=3)
    sample(logits_RV, [request(temperature=temperature), request(**filters, **params)])
    assert torch.equal(logits_RV, before_RV)
