"""bfloat16 weights on a CPU: products are those of the model's weights, in sums of float32."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams, make_workload
from engine.backends.cpu.model import CompiledDecoder
from engine.backends.cpu.simd import HAS_PAIR_PRODUCTS
from engine.models import LoadedModel
from engine.models.attention_trace import attention_layers
from engine.models.decoder_spec import describe
from engine.step import Batch, Span
from tests.pairwise import grid
from tests.test_families import COMPILED, made

NAMES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3")
TOKENS = [(31 * i) % 256 for i in range(70)]


@torch.no_grad()
def logits(
    model: torch.nn.Module, kv: torch.dtype = torch.uint16, page: int = 16, tokens: list[int] = TOKENS
) -> tuple[CompiledDecoder, torch.Tensor]:
    spec = describe(model, attention_layers(model))
    assert spec is not None
    compiled = CompiledDecoder(spec, page)
    compiled._kv_dtype = kv
    count, pages = len(tokens), -(-len(tokens) // page)
    compiled.allocate_kv(pages)
    batch = Batch(tokens, [Span(0, count, 0, list(range(pages))[::-1])], list(range(count)))
    return compiled, compiled.logits(batch)


def check_against_float32() -> None:
    """Where what is folded into weights is a power of two, nothing is rounded but the weights, and keys and
    values, which are float32 here."""
    model = made(*COMPILED["llama"]).bfloat16()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(2)
            layer.post_attention_layernorm.weight.fill_(0.5)
        model.model.norm.weight.fill_(1)
        assert (model.config.head_dim**-0.5).as_integer_ratio()[0] == 1, "a power of two"
        compiled, found = logits(model, torch.float32)
        expected = copy.deepcopy(model).float()(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear)
    assert 2 * linear <= compiled.copied_bytes < 3.4 * linear, "two bytes a weight, and what fills panels"


@pytest.mark.skipif(HAS_PAIR_PRODUCTS, reason="this processor rounds what is multiplied as well")
def test_logits_are_those_of_the_weights_in_float32():
    check_against_float32()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PAIR_PRODUCTS, reason="this processor widens weights anyway")
def test_a_processor_that_widens_weights_gives_the_logits_of_float32():
    """As Numba compiles for it when it is told to."""
    code = """
from tests.test_bfloat16 import check_against_float32, check_near_float32
check_against_float32()
check_near_float32("llama", 48, 300)
"""
    env = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMPILED)
def test_every_family_is_nearer_to_float32_than_the_model_itself(name):
    """Though a norm's scale is folded into its product's weights, and they are rounded."""
    check_near_float32(name, 16, 70)


@pytest.mark.parametrize(("name", "page"), grid(["llama", "gemma3"], [5, 16, 48, 128]))
def test_a_long_text_is_nearer_to_float32_than_the_model_itself(name, page):
    """Its pages are several stretches, of which a softmax is put together."""
    check_near_float32(name, page, 300)


def check_near_float32(name: str, page: int, count: int) -> None:
    model, tokens = made(*COMPILED[name]).bfloat16(), [(31 * i) % 256 for i in range(count)]
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(torch.tensor([tokens])).logits[0]
        own = model(torch.tensor([tokens])).logits[0].float()
        _, found = logits(model, page=page, tokens=tokens)
    off, own_off = ((x - expected).norm() / expected.norm() for x in (found, own))
    assert float(off) <= 1.2 * float(own_off)


@pytest.mark.parametrize("policy", ["sequential", "dynamic", "continuous"])
@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_unbatched_to_the_bit(tiny, name, policy):
    loaded: LoadedModel = tiny(name, "bfloat16").loaded
    items = make_workload("mixed-12", vocab_size=256, seed=1).items
    prompts = [(3 * item.prompt)[: 60 + 40 * i] for i, item in enumerate(items)]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=3)

    def run(chosen, **options):
        engine = Engine(loaded, EngineConfig(deterministic=True, kv_memory=2**22, policy=policy, **options))
        assert isinstance(engine.runner.backend, CompiledDecoder)
        return [(o.token_ids, o.logprobs) for o in engine.generate(chosen, params, progress=False)]

    alone = [run([prompt], max_batch_size=1)[0] for prompt in prompts[:4]]
    assert run(prompts, max_batch_size=5, max_step_tokens=40)[:4] == alone


def test_pages_are_counted_as_they_are_held(tiny):
    """Keys and values are in bfloat16, as weights are."""
    loaded = tiny("tiny-llama", "bfloat16").loaded
    engine = Engine(loaded, EngineConfig(max_batch_size=2, kv_memory=2**20))
    assert engine.runner.backend.page_bytes * engine.scheduler.memory.pages <= 2**20
