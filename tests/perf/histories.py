"""Made-up histories: runs of one benchmark, night by night, with a commit each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.gate.entries import Benchmark
from perf.gate.saved_runs import Run
from perf.gate.tolerances import Tolerance

NAME = "perf/benchmarks/test_policies.py::test_policy[cpu-dynamic]"


def history(
    values: Mapping[str, Sequence[float]],
    *,
    commit: Mapping[str, Any] | None = None,
    gate: Mapping[str, float] | None = None,
    prints: Sequence[Mapping[str, str]] | None = None,
    workloads: Sequence[str] | None = None,
    name: str = NAME,
) -> list[Run]:
    """Runs, oldest first, whose rounds of each metric are three of its value there.

    Args:
        commit: that of all runs; without one each has its own, its number in hex.
        gate: relative tolerances by metric.
        prints, workloads: fingerprint and workload of each run.
    """
    count = len(next(iter(values.values())))
    limits = {metric: Tolerance(rel, 0.0) for metric, rel in (gate or {}).items()}
    runs = []
    for at in range(count):
        rounds = {metric: (series[at],) * 3 for metric, series in values.items()}
        info = {"workload": workloads[at] if workloads else "mixed-8"}
        fingerprint = prints[at] if prints else {"gpu": "H200"}
        benchmark = Benchmark(name, "policy", info, rounds, fingerprint, limits)
        about = {"id": f"{at:09x}{'0' * 31}", "dirty": False} if commit is None else commit
        path, day = (
            Path(f"{at + 1:04d}_night.json"),
            f"2026-{at // 28 + 1:02d}-{at % 28 + 1:02d}T02:10:00+00:00",
        )
        runs.append(Run("night", path, {}, about, day, {name: benchmark}))
    return runs
