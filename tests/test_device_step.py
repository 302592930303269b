"""Steps whose tokens stay on the device, one step ahead of the host, without a GPU: the oracle's tokens all the same."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

import engine.engine
from engine import Engine, EngineConfig, SamplingParams
from engine.models import kv_bytes_per_token
from engine.runner.graphs import DeviceRunner, bucket
from tests.oracle import Oracle
from tests.test_packed import NAMES, WAYS, drive, exactly, work_of


@pytest.fixture(autouse=True)
def _device_runner(monkeypatch):
    """The runner for a GPU, on the CPU by way of the reference functions."""
    monkeypatch.setattr(engine.engine, "packed_runner", DeviceRunner)


def build(oracle: Oracle, kv_tokens: int | None = None, **config) -> Engine:
    token_bytes = kv_bytes_per_token(oracle.model.config, oracle.model.dtype.itemsize)
    memory = (kv_tokens or 20_000) * token_bytes
    return Engine(oracle.loaded, EngineConfig(runner="packed", kv_memory=memory, **config))


@pytest.mark.parametrize(("batch", "chunk", "page", "caching", "kv_tokens"), WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_generate_one_by_one(tiny, name, batch, chunk, page, caching, kv_tokens):
    oracle: Oracle = tiny(name, "float64")
    options = dict(max_batch_size=batch, max_step_tokens=chunk, page_size=page, prefix_caching=caching)
    server = build(oracle, kv_tokens, policy="continuous", **options)
    work = work_of(24 if batch == 64 else 12)
    order = list(range(len(work)))
    random.Random(batch * chunk).shuffle(order)
    for output, (_, limit) in zip(drive(server, work, order, every=1 + batch // 4), work, strict=True):
        oracle.check(output, limit)
    if (batch, page, kv_tokens) == (64, 1, 200):
        assert server.metrics.counters.preemptions > 0
