"""The CPU's gate: every workload, policy and tiny model costs exactly what it cost when its counters were
recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from perf.measure import counters


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("spec", counters.MODELS)
def test_counters(spec: str) -> None:
    base = {row: values for row, values in counters.saved().items() if row.split()[0] == spec}
    found = list(counters.differences(base, counters.measure(spec)))
    assert not found, "if this is meant: python -m perf counters --record\n" + "\n".join(found)
