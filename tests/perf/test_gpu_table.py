"""The table of the CUDA path on a CPU and a tiny model: it must not break before it meets a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import gpu_compiled
from perf.gpu_table import Bench, measured, rows
from tests import reference


@pytest.fixture
def bench() -> Iterator[Bench]:
    # float64: torch.compile does not look into the packed weights that float32 has on a CPU.
    bench = Bench("cpu", "float64", tiny=True)
    yield bench
    bench.free()


def test_every_row_is_measured(bench):
    """All that a CPU can measure but the peer's, whose threads take 20 s to end."""
    table = rows(bench, Path("unused"))
    del table["mixed-256 vs transformers"]
    for name, measure in table.items():
        row = measure()
        assert row, name
        assert all(isinstance(figure, str) or figure >= 0 for figure in row.values()), name


def test_decode_with_a_compiled_model(bench):
    row = gpu_compiled.decode(bench, 3, backend="aot_eager", kernels=reference)
    assert row["tok_s"] > 0
    assert row["compile_s"] > 0
    assert row["graphs"] == 1, "the whole model, for one number of rows"


def test_a_row_that_fails_says_why_and_leaves_the_next_alone(bench):
    row = measured(bench, lambda: gpu_compiled.decode(bench, 3, backend="no such backend", kernels=reference))
    assert "no such backend" in row["failed"]
    assert bench.decode(bench.main, 1)["tok_s"] > 0
