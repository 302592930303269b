"""The padded runner: padding is inert, rows leave, passes are as few and as narrow as pays."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.kv_pool import RowPool
from engine.models import refuse_other_state
from engine.request import Request
from engine.runner.padded import PaddedRunner, RowLayer
from engine.scheduler import Scheduler
from tests.conftest import TINY
from tests.serving import exactly, prompts_of


class Padding(PaddedRunner):
    """Puts another token where a row has none, and columns of padding before them all."""

    def __init__(self, model, pad_id: int = 0, columns: int = 0) -> None:
        self.pad_id, self.columns = pad_id, 0
        super().__init__(model, 8192, RowPool(10**6))
        self.columns = columns

    def _start(self, requests):
        super()._start(requests)
        self._starts += self.columns
        width = int(self._starts.max()) + 64 + self.columns
        self._layers = [RowLayer(len(requests), width) for _ in self._layers]
        self._cache.layers = list(self._layers)

    def _inputs(self, rows, begin, end):
        inputs = super()._inputs(rows, begin, end)
        for row, start in enumerate(self._starts[:rows]):
            inputs["input_ids"][row, : max(0, start - begin)] = self.pad_id
        return inputs


def logprobs_with(loaded, prompts, **padding) -> tuple[list, np.ndarray]:
    engine = Engine(loaded)
    engine.runner = Padding(loaded.model, **padding)
    engine.scheduler = Scheduler("dynamic", 32, 10**6, engine.runner.memory)
    params = SamplingParams(10, ignore_eos=True, logprobs=5)
    outputs = engine.generate(prompts, params, progress=False)
    top = [[pair[1] for step in output.logprobs for pair in step.top] for output in outputs]
    return [output.token_ids for output in outputs], np.array(top)


@pytest.mark.parametrize("name", TINY)
def test_pad_id_and_amount_of_padding_change_nothing(tiny, name):
    loaded = tiny(name, "float64").loaded
    prompts = prompts_of(7)
    tokens, logprobs = logprobs_with(loaded, prompts)
    for padding in (dict(pad_id=2), dict(pad_id=255), dict(columns=1), dict(pad_id=9, columns=33)):
        other_tokens, other_logprobs = logprobs_with(loaded, prompts, **padding)
        assert other_tokens == tokens
        np.testing.assert_allclose(other_logprobs, logprobs, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_side_of_padding_changes_nothing(tiny, name):
    """The runner pads on the left; Transformers with the same prompts padded on the right agrees."""
    loaded = tiny(name, "float64").loaded
    prompts = prompts_of(7)
    _, logprobs = logprobs_with(loaded, prompts)
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [9] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    with torch.inference_mode():
        logits = loaded.model(ids, attention_mask=mask).logits
    last = logits[torch.arange(len(prompts)), mask.sum(1) - 1].log_softmax(-1)
    np.testing.assert_allclose(logprobs[:, :5], last.topk(5).values.numpy(), atol=1e-9)


def test_neighbours_are_inert(tiny):
    loaded = tiny("tiny-gemma3", "float64").loaded
    prompts = prompts_of(6)
    tokens, logprobs = logprobs_with(loaded, prompts)
    for seed in range(3):
        others = prompts_of(6, seed=seed + 1)
        other_tokens, other_logprobs = logprobs_with(loaded, [prompts[0], *others[1:]])
        assert other_tokens[0] == tokens[0]
        np.testing.assert_allclose(other_logprobs[0], logprobs[0], atol=1e-9)


def test_rows_that_finish_are_computed_no_further(tiny):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8))
    limits = [1, 2, 3, 5, 8, 13, 21, 34]
    outputs = engine.generate(
        [[7 + i] * 6 for i in range(8)], [exactly(limit) for limit in limits], progress=False
    )
    assert engine.metrics.counters.padded_tokens == 0
    assert engine.metrics.counters.forward_passes == 34
    assert engine.metrics.counters.tokens_computed == sum(5 + limit for limit in limits)
    for output, limit in zip(outputs, limits, strict=True):
        oracle.check(output, limit)


@cache
def runner_of(model) -> PaddedRunner:
    """A runner that many tests may share: each starts a batch of its own, and computes nothing."""
    return PaddedRunner(model, 8192, RowPool(10**6))


def passes_of(loaded, lengths, pass_tokens, max_step_tokens=8192):
    runner = runner_of(loaded.model)
    runner.max_step_tokens, runner.pass_tokens = max_step_tokens, pass_tokens
    runner._start([Request(str(i), n, SamplingParams(4), [1] * n) for i, n in enumerate(lengths)])
    return runner._staircase()


def test_even_prompts_prefill_in_one_pass_and_uneven_ones_in_a_staircase(tiny):
    loaded = tiny().loaded
    assert passes_of(loaded, [20, 18, 19], pass_tokens=32) == [(3, 0, 20)]
    assert passes_of(loaded, [200, 10, 10, 10], pass_tokens=32) == [(1, 0, 190), (4, 190, 200)]
    assert passes_of(loaded, [8, 8], pass_tokens=32, max_step_tokens=8) == [(2, 0, 4), (2, 4, 8)]


@settings(max_examples=10 * settings().max_examples)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    pass_tokens=st.integers(0, 60),
    max_step_tokens=st.integers(1, 100),
)
def test_passes_cover_every_token_once_in_order(tiny, lengths, pass_tokens, max_step_tokens):
    passes = passes_of(tiny().loaded, lengths, pass_tokens, max_step_tokens)
    width, rows_sorted = max(lengths), sorted(lengths, reverse=True)
    assert passes[0][1] == 0
    assert passes[-1][2] == width
    assert passes[-1][0] == len(lengths)
    assert all(before[2] == after[1] for before, after in itertools.pairwise(passes))
    for rows, begin, end in passes:
        assert rows == sum(width - length < end for length in rows_sorted), (
            "every row with a token in the pass"
        )
        assert rows * (end - begin) <= max(max_step_tokens, rows)
    one_pass = len(lengths) * width + pass_tokens
    wide = passes_of(tiny().loaded, lengths, pass_tokens)
    assert sum(rows * (end - begin) + pass_tokens for rows, begin, end in wide) <= one_pass


def test_models_with_other_state_are_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4))
    with pytest.raises(InputError, match="MambaForCausalLM has"):
        refuse_other_state(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("policy", ["dynamic", "continuous"])
def test_equals_generate_on_cuda(policy, name, dtype):
    from engine.models import load
    from tests.oracle import Oracle

    oracle = Oracle(load(f"random:{name}", device="cuda", dtype=dtype))
    engine = Engine(oracle.loaded, EngineConfig(policy=policy, max_batch_size=8))
    for output in engine.generate(prompts_of(20), exactly(16), progress=False):
        oracle.check(output, 16)
