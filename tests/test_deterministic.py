"""deterministic=True: the same bits in any company for whatever a model is made of, or a refusal.

T tokens, M width, I inner width of a layer, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Starcoder2Config,
)

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.models import LoadedModel
from engine.runner.deterministic import DeterministicModel
from tests.oracle import Oracle
from tests.serving import use_device_runner

SIZES: dict[str, Any] = dict(
    vocab_size=251, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
)
WIDE = dict(**SIZES, num_key_value_heads=2, head_dim=12)
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=251, n_embd=48, n_layer=2, n_head=4, n_positions=256),
    "gpt2-odd": lambda: GPT2Config(vocab_size=251, n_embd=36, n_inner=51, n_layer=2, n_head=4),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=80, word_embed_proj_dim=48),
    "phi-odd": lambda: PhiConfig(**SIZES, intermediate_size=51),
    "starcoder2": lambda: Starcoder2Config(**SIZES, num_key_value_heads=2, intermediate_size=80),
    "starcoder2-odd": lambda: Starcoder2Config(**SIZES, num_key_value_heads=1, intermediate_size=51),
    "gemma3-odd": lambda: Gemma3TextConfig(**WIDE, intermediate_size=51),
    "llama": lambda: LlamaConfig(**WIDE, intermediate_size=80),
}
PROMPTS = [np.random.default_rng(n).integers(3, 250, size=n).tolist() for n in (1, 17, 30, 5, 9)]
COMPANIES: list[dict[str, Any]] = [
    dict(max_batch_size=5),
    dict(max_batch_size=3, max_step_tokens=5, prefix_caching=False),
    dict(max_batch_size=5, policy="dynamic", max_step_tokens=33),
]


def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.15)
    return model


def answers(model: PreTrainedModel, **options) -> list[Any]:
    """Of each prompt, tokens and their log-probabilities, which all logits go into, from a new engine."""
    config = EngineConfig(deterministic=True, page_size=8, kv_memory=2**24, **options)
    server = Engine(LoadedModel("made", model, None, "made"), config)
    params = SamplingParams(4, ignore_eos=True, logprobs=5)
    outputs = server.generate(PROMPTS, params, progress=False)
    if model.dtype is torch.float32:
        Oracle(server.loaded).check(outputs[1], 4)
    return [(output.token_ids, output.logprobs) for output in outputs]


def check_bits(model: PreTrainedModel) -> None:
    alone = answers(model, max_batch_size=1)
    for company in COMPANIES:
        assert answers(model, **company) == alone, company


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("gpt2", "starcoder2") else ())
        for name in CONFIGS
    ],
)
def test_the_same_bits_in_any_company(name):
    check_bits(model_of(name))


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.bfloat16), ("llama", torch.float64)], ids=str)
def test_in_other_dtypes(name, dtype):
    check_bits(model_of(name, dtype))


@pytest.mark.slow  # threads that spin beside another worker of the tests
@pytest.mark.parametrize("threads", [2, 3])
def test_with_work_for_several_threads(threads):
    """Where it is divided depends on how much there is; what is left over at an end is computed otherwise."""
    config = GPT2Config(vocab_size=251, n_embd=48, n_inner=2102, n_layer=1, n_head=4, n_positions=256)
    config.bos_token_id, config.eos_token_id = 1, 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    torch.set_num_threads(threads)  # the fixture of all tests puts it back
    check_bits(model)


class Einsum(nn.Module):
    """A layer's MLP by products that are no modules."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_MI = nn.Parameter(torch.randn(width, inner) / 7, requires_grad=False)
        self.down_IM = nn.Parameter(torch.randn(inner, width) / 7, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(torch.einsum("btm,mi->bti", x, self.up_MI)) @ self.down_IM


class OwnLinear(nn.Linear):
    """A linear layer of another type."""


class Typed(nn.Sequential):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__(OwnLinear(width, inner), nn.GELU(), OwnLinear(inner, width))


class Convolution(nn.Module):
    """A linear layer as a convolution with a kernel of one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(width, inner, 1), nn.Conv1d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x.transpose(1, 2)).relu()).transpose(1, 2)


class Experts(nn.Module):
    """Each token goes to one of several MLPs, with whoever else goes there."""

    def __init__(self, width: int, inner: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Einsum(width, inner) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, flat = torch.zeros_like(x.flatten(0, 1)), x.flatten(0, 1)
        chosen_T = self.router(flat).argmax(-1)
        for index, expert in enumerate(self.experts):
            here = chosen_T == index
            if here.any():
                out[here] = expert(flat[here][None])[0]
        return out.view_as(x)


class Grouped(nn.Module):
    """Experts as one product of groups."""

    def __init__(self, width: int, inner: int, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.weight_EMM = nn.Parameter(torch.randn(experts, width, width) / 7, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen_T, order_T = self.router(flat).argmax(-1).sort(stable=True)
        ends_E = chosen_T.bincount(minlength=len(self.weight_EMM)).cumsum(0).int()
        out = torch.empty_like(flat)
        out[order_T] = torch._grouped_mm(flat[order_T], self.weight_EMM, ends_E)
        return out.view_as(x)


class Restless(nn.Module):
    """Gives a little more at every call."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(width, width), [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.linear(x) * (1 + 1e-6 * self.calls[0])


def with_mlp(kind: Any, width: int = 48) -> PreTrainedModel:
    model = model_of("llama")
    model.model.layers[1].mlp = kind(width, 50).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", [Einsum, Typed, Convolution])
def test_whatever_multiplies_gives_the_same_bits(kind):
    check_bits(with_mlp(kind))


@pytest.mark.parametrize(
    ("kind", "why"), [(Experts, "for some tokens|in other company"), (Grouped, "_grouped_mm|in other")]
)
def test_experts_are_seen_and_run_a_token_at_a_time(kind, why, caplog):
    with caplog.at_level(logging.WARNING):
        check_bits(with_mlp(kind))
    messages = {record.getMessage() for record in caplog.records if "deterministic" in record.getMessage()}
    assert messages
    assert all(message.endswith("deterministic steps take one token at a time") for message in messages)


def test_what_a_model_does_for_some_tokens_only_is_seen_though_its_numbers_agree(caplog, monkeypatch):
    """Products of few numbers may happen to agree: what is called tells nevertheless."""
    monkeypatch.setattr("engine.runner.deterministic._problem", lambda packed, prove: None)
    with caplog.at_level(logging.WARNING):
        for kind in (Experts, Grouped, Einsum):
            answers(with_mlp(kind))
    one, other = (record.getMessage() for record in caplog.records)
    assert "for some tokens" in one
    assert "_grouped_mm" in other


def test_a_model_that_company_changes_even_so_is_refused():
    model = with_mlp(Restless)
    with pytest.raises(InputError, match=r"^deterministic=True: LlamaFor.* company: leave it out$"):
        answers(model)
    Engine(LoadedModel("made", model, None, "made"))


def test_a_pass_has_one_size_and_what_fills_it_harms_nobody():
    model = model_of("gpt2")
    config = EngineConfig(deterministic=True, page_size=8, kv_memory=2**20)
    server = Engine(LoadedModel("made", model, None, "made"), config)
    packed, sizes = server.runner.model, set()
    assert isinstance(packed, DeterministicModel)
    with packed.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.add(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    ):
        outputs = server.generate(PROMPTS, SamplingParams(5, ignore_eos=True), progress=False)
    assert sizes == {(1, 16)}
    for output in outputs:
        Oracle(server.loaded).check(output, 5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_neighbour_that_is_not_a_number_changes_nobody(deterministic):
    """The first of the rows, whose pages stand in where others have fewer."""
    model = model_of("gemma3-odd")
    config = EngineConfig(deterministic=deterministic, page_size=4, prefix_caching=False, max_batch_size=3)
    server = Engine(LoadedModel("made", model, None, "made"), config)
    params, prompts = SamplingParams(6, ignore_eos=True), ([7] * 2, [9] * 14, [8] * 20)
    requests = [server.add_request(prompt, params) for prompt in prompts]
    server.step()
    embedding, first = server.runner.model.model.get_input_embeddings(), torch.tensor([0])
    with embedding.register_forward_hook(lambda module, ids, x: x.index_fill(1, first, torch.nan)):
        server.step()
    while server.has_work:
        server.step()
    assert [request.result.finish_reason for request in requests] == ["error", "length", "length"]
    for request in requests[1:]:
        Oracle(server.loaded).check(request.result, 6)


@pytest.fixture
def device_steps(monkeypatch) -> None:
    use_device_runner(monkeypatch)


@pytest.mark.usefixtures("device_steps")
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_device_steps_give_the_same_bits_in_any_company(name):
    check_bits(model_of(name))


@pytest.mark.usefixtures("device_steps")
@pytest.mark.parametrize("kind", [Einsum, Experts])
def test_device_steps_refuse_what_they_cannot_keep_the_same(kind):
    with pytest.raises(InputError, match=r"^deterministic=True: .* other logits in other company"):
        answers(with_mlp(kind))
