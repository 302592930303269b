"""Models that tests share: loaded once, and the oracle's answers for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from engine.models import LoadedModel, load
from tests.oracle import Oracle

TINY = ("tiny-qwen2", "tiny-llama", "tiny-gemma3")


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
def smollm2() -> Iterator[LoadedModel]:
    return load("smollm2")
