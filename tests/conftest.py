"""Models that tests share: loaded once, and the oracle's answers for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU then, if set before Triton is imported

from engine.models import LoadedModel, load
from tests.oracle import Oracle

TINY = ("tiny-qwen2", "tiny-llama", "tiny-gemma3")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for tiny models: dividing their products among several takes longer than computing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if any("smollm2" in name for name in request.fixturenames) else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Oracle]:
    """`tiny(name, dtype)` gives a random-weights model with its oracle."""
    known: dict[tuple[str, str], Oracle] = {}

    def get(name: str = "tiny-qwen2", dtype: str = "float32") -> Oracle:
        if (name, dtype) not in known:
            known[name, dtype] = Oracle(load(f"random:{name}", dtype=dtype))
        return known[name, dtype]

    return get


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load("smollm2")
