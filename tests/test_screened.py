"""The largest logit found without computing all: never another than the exact product's, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from engine import Engine, EngineConfig, SamplingParams
from engine.request import Request
from engine.runner import screened
from engine.runner.linear import Product, prepare
from engine.runner.screened import BLOCK, Screened
from engine.sampler import takes_largest
from tests.oracle import Oracle


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Screening pays, even for toys."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products here")
    monkeypatch.setattr(screened, "choose", lambda weights, ways: [(10**6, "screened")])


def build(weight_VM: torch.Tensor) -> Screened:
    whole = Product([weight_VM], [])
    prepare([whole])
    found = Screened(whole, weight_VM)
    found.largest = True
    return found


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 9),
    width=st.sampled_from([3, 32, 129]),
    blocks=st.integers(1, 40),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    close=st.sampled_from([0.0, 1e-5, 1e-3, 1e-1]),
    outlier=st.sampled_from([1.0, 1e3]),
)
def test_the_largest_is_never_ruled_out(seed, rows, width, blocks, scale, close, outlier):
    """Rows of weights that nearly tie, inputs that are far larger than others, all sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(blocks * BLOCK, width, generator=generator)
    if close:  # every token's weights are about those of a few
        few = weight[torch.randint(0, 5, (len(weight),), generator=generator)]
        weight = few + close * torch.randn(weight.shape, generator=generator)
    x = torch.randn(rows, width, generator=generator) * scale
    x[:, 0] *= outlier
    logits = build(weight).screen(x)
    exact = x.double() @ weight.double().t()
    rounding = 1e-5 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max())
    picked = exact.gather(1, logits.argmax(1, keepdim=True))
    assert bool((picked >= exact.amax(1, keepdim=True) - rounding).all())
    left = logits.isfinite()
    assert bool(left.any(1).all())
    assert bool(((logits - exact).abs() <= rounding)[left].all()), "what is left is computed in float32"


def test_few_tokens_are_left_of_many():
    weight = torch.randn(200 * BLOCK, 256, generator=torch.Generator().manual_seed(0))
    logits = build(weight).screen(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)))
    assert int(logits.isfinite().sum()) < 100
    assert bool((logits.isfinite() | logits.isneginf()).all())


def test_many_ties_are_computed_whole():
    weight, x = torch.ones(10 * BLOCK, 16), torch.ones(2, 16)
    torch.testing.assert_close(build(weight).screen(x), F.linear(x, weight))


def test_a_row_without_numbers_has_no_largest_and_its_neighbours_have():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(10 * BLOCK, 16, generator=generator), torch.randn(4, 16, generator=generator)
    clean = build(weight).screen(x)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    logits = build(weight).screen(x)
    assert bool(logits[[1, 2]].isneginf().all())
    assert torch.equal(logits[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize(
    ("largest", "params"),
    [
        (True, {}),
        (True, {"top_k": 5}),
        (True, {"min_new_tokens": 0}),
        (False, {"temperature": 0.5}),
        (False, {"repetition_penalty": 1.1}),
        (False, {"logprobs": 0}),
        (False, {"min_new_tokens": 1, "stop_token_ids": [3]}),
    ],
)
def test_the_largest_is_all_that_plain_greedy_takes(largest, params):
    params = SamplingParams(**params)
    request = Request("a", 2, params, [1, 2], stop_ids=frozenset(params.stop_token_ids))
    assert takes_largest(request) is largest


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
def test_greedy_requests_get_the_same_tokens_and_others_all_logits(tiny, name):
    oracle: Oracle = tiny(name)
    engine = Engine(oracle.loaded, EngineConfig(runner="packed", max_batch_size=4))
    head = engine.runner._head
    assert isinstance(head, Screened)
    seen, screen = [], head.screen
    head.ways = [(10**6, lambda x_RM, *_: seen.append(len(x_RM)) or screen(x_RM))]
    prompts = [[5, 6, 7], [9] * 20, [3, 1, 4, 1, 5, 9, 2, 6]]
    greedy = SamplingParams(max_new_tokens=8, ignore_eos=True)
    for output in engine.generate(prompts, greedy, progress=False):
        oracle.check(output, 8)
    assert seen, "screened"
    seen.clear()
    drawn = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=1.0, seed=3, logprobs=2)
    outputs = engine.generate(prompts, [greedy, drawn, greedy], progress=False)
    assert not seen, "a neighbour needs all logits"
    assert all(entry.logprob > -1e3 and len(entry.top) == 2 for entry in outputs[1].logprobs)
    for output in (outputs[0], outputs[2]):
        oracle.check(output, 8)


def test_what_does_not_prove_right_is_left_out(tiny, monkeypatch, caplog):
    monkeypatch.setattr(Screened, "screen", lambda self, x_RM, *_: -self.whole(x_RM))
    oracle: Oracle = tiny("tiny-llama")
    engine = Engine(oracle.loaded, EngineConfig(runner="packed"))
    assert engine.runner._head is None
    assert "all of them are computed" in caplog.text
    (output,) = engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=8, ignore_eos=True), progress=False)
    oracle.check(output, 8)


def test_a_deterministic_engine_computes_all(tiny):
    engine = Engine(tiny("tiny-llama").loaded, EngineConfig(runner="packed", deterministic=True))
    assert engine.runner._head is None
