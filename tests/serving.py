"""Requests, and engines that serve them: what the engine's tests share.

Prompts come from a few seeds, so that an oracle answers each of them once.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.kv_pool import PagePool
from engine.models import kv_bytes_per_token
from engine.runner.cuda import CudaRunner
from tests import reference
from tests.oracle import Oracle

NAMES = ("tiny-qwen2", "tiny-llama", "tiny-gemma3", "tiny-mistral", "tiny-qwen3")
# (batch, step tokens, page, caching, tokens of KV memory): every value of each, small memory with every page
# size.
WAYS = [
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


def on_reference(model, pool, deterministic, rows, int8) -> CudaRunner:
    return CudaRunner(model, pool, deterministic, rows, reference)


def use_device_runner(patch: pytest.MonkeyPatch) -> None:
    """Have packed engines take the runner for a GPU, on the CPU by way of the reference functions."""
    patch.setattr("engine.engine.make_runner", on_reference)
    patch.setattr("engine.backends.gemm_tuner.can_pack", lambda weight: False)  # weights stay as they are


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
    """Drive requests through a runner that has memory for 72 tokens a step, and check what they get."""
    logits = CudaRunner._logits

    def little_memory(self, sizes, *rest):
        if sizes.rows + sizes.tokens > 72:
            raise torch.OutOfMemoryError("planted")
        return logits(self, sizes, *rest)

    monkeypatch.setattr(CudaRunner, "_logits", little_memory)
    for output, (_, limit) in zip(drive(server, work_of(16), every=8), work_of(16), strict=True):
        oracle.check(output, limit)
