"""Steady decode watched from outside: the time between kernels, from a trace, and NVML's utilisation.

Watching slows what is watched, so nothing here is timed: the benchmark times the same work by itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from engine import Engine, WorkItem
from perf.gate.entries import Flat
from perf.measure.machine_speed import sync
from perf.measure.nvml import GpuReading, Monitor

WARM_UP_STEPS, TRACED_STEPS = 20, 40
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events in which the GPU works


@contextmanager
def decoding(engine: Engine, items: Sequence[WorkItem]) -> Iterator[None]:
    """Bring all requests to where each step is a token for every one of them, and abort them at the end.

    Raises:
        RuntimeError: if one ends on the way: it failed, or its output is shorter than the others' prompts
            take steps.
    """
    requests = [engine.add_request(item.prompt, item.params) for item in items]
    try:
        while min(request.output_len for request in requests) < 2:
            if not _step(engine):
                raise RuntimeError("a request ended before all of them were decoding")
        yield
    finally:
        for request in requests:
            engine.abort(request.id)


def idle_time(engine: Engine, device: str, file: Path | None = None) -> Flat:
    """Trace decode steps of an engine that is `decoding`; see `gaps` for what is returned.

    Args:
        file: where to keep the trace, as chrome://tracing and Perfetto read it; and beside it, as
            `NAME-kernels.json`, the times `by_kernel`.
    """
    for _ in range(WARM_UP_STEPS):
        engine.step()
    cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        for _ in range(TRACED_STEPS):
            engine.step()
        sync(device)
    with tempfile.TemporaryDirectory() as scratch:
        path = file or Path(scratch, "trace.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        table = json.dumps(by_kernel(events, TRACED_STEPS), indent=1)
        path.with_name(f"{path.stem}-kernels.json").write_text(table, encoding="utf-8")
        return gaps(events, TRACED_STEPS)


def by_kernel(events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Return a row for each kernel and grid of a trace of so many `steps`, that which costs most first.

    Kernels overlap, where one begins while another ends. So what a kernel costs, `us`, is the time from the
    end of the one that ended before it to its own end, gaps included; `own_us` is as long as it ran.
    """
    ends: list[tuple[float, float, str, str]] = sorted(
        (e["ts"] + e["dur"], e["dur"], e["name"], str(e.get("args", {}).get("grid", "")))
        for e in events
        if e.get("cat") in KERNELS
    )
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    before: float | None = None
    for end, own, name, grid in ends:
        found[name, grid].append((own if before is None else end - before, own))
        before = end
    rows = [
        {
            "kernel": name,
            "grid": grid,
            "a_step": len(times) / steps,
            "us": sum(us for us, _ in times) / len(times),
            "own_us": sum(own for _, own in times) / len(times),
        }
        for (name, grid), times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["a_step"] * row["us"])


def gaps(events: Iterable[dict[str, Any]], steps: int) -> Flat:
    """Return `idle_pct`, the share of the time from the first kernel to the end of the last in which none
    runs, `longest_gap_us`, and `kernels_per_step`; None each where nothing ran on a GPU.

    Args:
        events: of a trace of so many `steps`; a kernel begins at `ts` and takes `dur`, microseconds. Copies
            and fills count as kernels, and those that overlap as one stretch of work.
    """
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in KERNELS)
    if not spans:
        return dict.fromkeys(("idle_pct", "longest_gap_us", "kernels_per_step"))
    idle, longest, busy_until = 0.0, 0.0, spans[0][0]
    for begin, end in spans:
        gap = max(0.0, begin - busy_until)
        idle, longest, busy_until = idle + gap, max(longest, gap), max(busy_until, end)
    return {
        "idle_pct": 100 * idle / (busy_until - spans[0][0]),
        "longest_gap_us": longest,
        "kernels_per_step": len(spans) / steps,
    }


def utilisation(engine: Engine, device: str, settle_s: float, seconds: float) -> GpuReading:
    """Read NVML while an engine is `decoding`, for so many seconds after others in which it settles.

    NVML's utilisation is of up to a second that is past, hence `settle_s`. Where a request ends meanwhile
    there is no reading, and `reason` says so.
    """
    steady = _step_for(engine, settle_s)
    with Monitor(device) as monitor:
        steady = steady and _step_for(engine, seconds)
    return monitor.reading if steady else GpuReading(reason="a request ended before its decoding was read")


def _step_for(engine: Engine, seconds: float) -> bool:
    """Step for a time, at least once; return False, and step no more, once a request ends."""
    until = time.perf_counter() + seconds
    while _step(engine):
        if time.perf_counter() >= until:
            return True
    return False


def _step(engine: Engine) -> bool:
    """Step once, and return whether every request goes on."""
    return all(chunk.output is None for chunk in engine.step())
