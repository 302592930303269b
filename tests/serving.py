"""Requests, and engines that serve them: what the engine's tests share.

Prompts come from a few seeds, so that an oracle answers each of them once.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import Engine, EngineConfig, SamplingParams
from engine.backends.cuda.backend import CudaBackend
from engine.kv_pool import PagePool
from engine.models import LoadedModel, kv_bytes_per_token
from engine.models.decoder_spec import DecoderSpec
from engine.runner.packed import PackedRunner
from tests import reference
from tests.oracle import Oracle

NAMES = ("tiny-qwen2", "tiny-llama", "tiny-gemma3", "tiny-mistral", "tiny-qwen3")
# (batch, step tokens, page, caching, tokens of KV memory): every value of each, small memory with every page
# size.
SETTINGS = [
    (1, 8192, 16, True, None),
    (8, 7, 1, True, 120),
    (8, 64, 16, True, 112),
    (64, 64, 16, False, 160),
    (64, 8192, 256, True, None),
    (64, 7, 16, True, None),
    (8, 1, 256, False, 512),
    (64, 64, 1, False, 200),
]
both = pytest.mark.parametrize("config", [
    dict(policy="dynamic", runner="padded"), dict(policy="continuous", runner="packed"),
], ids=["padded", "packed"])  # fmt: skip


def exactly(tokens: int, **more) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, ignore_eos=True, **more)


def prompts_of(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 256, size=rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def work_of(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts with their limits. Some begin as another, some are another; the oracle answers each once."""
    rng = np.random.default_rng(seed)
    work: list[tuple[list[int], int]] = []
    for i in range(min(count, 16)):
        prompt = rng.integers(3, 256, size=rng.integers(1, 31)).tolist()
        work.append(((work[i // 2][0] + prompt)[:40] if i % 3 == 2 else prompt, 2 + i % 5))
    return [work[i % 16] for i in range(count)]


def packed(oracle: Oracle, kv_tokens: int | None = None, **config) -> Engine:
    """Build a packed engine with KV memory for so many tokens."""
    memory = (kv_tokens or 20_000) * kv_bytes_per_token(oracle.model)
    return Engine(oracle.loaded, EngineConfig(runner="packed", kv_memory=memory, **config))


def runner_of(model: PreTrainedModel, **config) -> PackedRunner:
    """Build the packed runner of a model."""
    return Engine(LoadedModel("made", model, None, "made"), EngineConfig(kv_memory=2**20, **config)).runner


def use_reference_kernels(patch: pytest.MonkeyPatch) -> None:
    """Have the backend for a GPU call plain functions of torch instead of Triton kernels."""
    kernels = pytest.importorskip("engine.backends.cuda.kernels", reason="needs Triton")
    for name in kernels.__all__:
        patch.setattr(kernels, name, getattr(reference, name))


def use_cuda_backend(patch: pytest.MonkeyPatch) -> None:
    """Have packed engines that are built from now on take the backend for a GPU, by the reference kernels."""
    use_reference_kernels(patch)
    patch.setattr("engine.runner.packed.decoder_backend", cuda_backend)


def cuda_backend(spec: DecoderSpec, config: EngineConfig) -> CudaBackend:
    return CudaBackend(spec, config.page_size, config.max_batch_size, config.deterministic)


def drive(engine: Engine, work, order=None, every=1) -> list:
    """Requests in `order`, a few between any two steps; their outputs in the order of the work."""
    order = list(range(len(work))) if order is None else order
    memory, requests, steps = engine.scheduler.memory, {}, 0
    while len(requests) < len(work) or engine.has_work:
        for i in order[len(requests) : len(requests) + every]:
            requests[i] = engine.add_request(work[i][0], exactly(work[i][1]))
        engine.step()
        if isinstance(memory, PagePool):
            memory.check_integrity()
        steps += 1
        assert steps < 10_000
    if isinstance(memory, PagePool):
        assert memory.pages_used == 0
    return [requests[i].result for i in range(len(work))]


def check_shuffled(oracle: Oracle, engine: Engine, batch: int, seed: int) -> None:
    """Work for batches of this size comes in some order, a few requests at a time; the oracle knows what each
    gets."""
    work = work_of(max(16, batch))
    order = list(range(len(work)))
    random.Random(batch * seed).shuffle(order)
    for output, (_, limit) in zip(drive(engine, work, order, every=1 + batch // 4), work, strict=True):
        oracle.check(output, limit)


def run_out_of_memory(oracle: Oracle, server: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drive requests through a backend that has memory for 72 tokens a step, and check what they get."""
    launch = CudaBackend.launch

    def little_memory(self, batch):
        if len(batch.tokens) > 72:
            raise torch.OutOfMemoryError("planted")
        return launch(self, batch)

    monkeypatch.setattr(CudaBackend, "launch", little_memory)
    for output, (_, limit) in zip(drive(server, work_of(16), every=8), work_of(16), strict=True):
        oracle.check(output, limit)
