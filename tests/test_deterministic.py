"""deterministic=True: the same bits in any company where a model's parts are known, or a refusal.

What the compiled decoder gives is tested in test_packed.py and test_families.py, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.models import LoadedModel
from tests.oracle import Oracle
from tests.serving import use_cuda_backend

LLAMA = dict(
    vocab_size=251, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LLAMA |= dict(max_position_embeddings=256, head_dim=16, intermediate_size=80)
PROMPTS = [np.random.default_rng(n).integers(3, 250, size=n).tolist() for n in (1, 17, 30, 5, 9)]
COMPANIES: list[dict[str, Any]] = [
    dict(max_batch_size=5),
    dict(max_batch_size=3, max_step_tokens=5, prefix_caching=False),
    dict(max_batch_size=5, policy="dynamic", max_step_tokens=33),
]


def made(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
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
    outputs = server.generate(PROMPTS, SamplingParams(4, ignore_eos=True, logprobs=5), progress=False)
    Oracle(server.loaded).check(outputs[1], 4)
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.mark.slow  # threads that spin beside another worker of the tests
@pytest.mark.parametrize("threads", [2, 3])
def test_with_work_for_several_threads(threads):
    """Where it is divided depends on how much there is; what is left over at an end is computed otherwise."""
    model = made(LlamaConfig(**LLAMA | dict(intermediate_size=2102)))
    torch.set_num_threads(threads)  # the fixture of all tests puts it back
    alone = answers(model, max_batch_size=1)
    for company in COMPANIES:
        assert answers(model, **company) == alone, company


class Restless(nn.Module):
    """Gives a little more at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(48, 48), [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.linear(x) * (1 + 1e-6 * self.calls[0])


def restless() -> PreTrainedModel:
    model = made(LlamaConfig(**LLAMA))
    model.model.layers[1].mlp = Restless().eval().requires_grad_(False)
    return model


UNKNOWN = {
    "other parts": lambda: made(GPT2Config(vocab_size=251, n_embd=48, n_layer=2, n_head=4, n_positions=256)),
    "another dtype": lambda: made(LlamaConfig(**LLAMA), torch.float64),
    "a part that company changes": restless,
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_model_that_runs_as_it_was_written_is_refused(what):
    model = UNKNOWN[what]()
    with pytest.raises(
        InputError, match=r"^deterministic=True is for decoders that run compiled: .*; leave it out$"
    ):
        answers(model)
    Engine(LoadedModel("made", model, None, "made"))


def test_a_backend_whose_bits_depend_on_company_is_refused(monkeypatch, caplog):
    """It gives the model's logits, but for a last bit where a batch has many tokens."""
    from engine.backends.cpu.model import CompiledDecoder

    logits = CompiledDecoder.logits
    monkeypatch.setattr(CompiledDecoder, "logits", lambda self, batch: logits(self, batch) * (
        1 + 2e-7 * (len(batch.tokens) > 30)
    ))  # fmt: skip
    model = made(LlamaConfig(**LLAMA))
    with pytest.raises(InputError, match=r"^deterministic=True is .*: Llama\w+ gives a token different"):
        answers(model)
    assert "gives a token different logits in a different batch: it is computed" in caplog.text
    Engine(LoadedModel("made", model, None, "made"), EngineConfig(kv_memory=2**22))


@pytest.mark.parametrize("policy", ["continuous", "dynamic"])
def test_the_backend_for_a_gpu_gives_the_same_bits_in_any_company(monkeypatch, policy):
    """A chunk attends as rows, and products have a fixed number of rows."""
    use_cuda_backend(monkeypatch)
    monkeypatch.setattr("engine.backends.cuda.model.ATTENDED_ROWS", 3)
    model = made(LlamaConfig(**LLAMA))
    alone = answers(model, max_batch_size=1)
    for company in COMPANIES:
        assert answers(model, **company | dict(policy=policy)) == alone, company


def test_a_neighbour_that_is_not_a_number_changes_nobody():
    """The first of the rows, beside others whose pages are fewer."""
    model = made(GPT2Config(vocab_size=251, n_embd=48, n_layer=2, n_head=4, n_positions=256))
    config = EngineConfig(page_size=4, prefix_caching=False, max_batch_size=3)
    server = Engine(LoadedModel("made", model, None, "made"), config)
    params, prompts = SamplingParams(6, ignore_eos=True), ([7] * 2, [9] * 14, [8] * 20)
    requests = [server.add_request(prompt, params) for prompt in prompts]
    server.step()
    embedding, first = server.runner.backend.model.get_input_embeddings(), torch.tensor([0])
    with embedding.register_forward_hook(lambda module, ids, x: x.index_fill(1, first, torch.nan)):
        server.step()
    while server.has_work:
        server.step()
    assert [request.result.finish_reason for request in requests] == ["error", "length", "length"]
    for request in requests[1:]:
        Oracle(server.loaded).check(request.result, 6)
