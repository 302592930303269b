"""Tables for the end of a pytest session: the benchmarks just measured, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from perf.report.terminal import Fitted, name_length, table
from perf.report.text import clean, middle

Info = dict[str, Any]
# columns of each table: a heading, and how its cell is formatted from what a benchmark recorded
PEERS = {
    "backend": "{backend}",
    "tokens/s": "{tokens_per_s:,.1f}",
    "x engine": "{ratio_to_engine:.3f}",
    "TTFT P95 ms": "{ttft_p95_ms:,.0f}",
    "TPOT P50 ms": "{tpot_p50_ms:,.1f}",
    "latency P95 ms": "{latency_p95_ms:,.0f}",
    "FLOPs %": "{useful_flops_pct:.1f}",
    "same tokens": "{same_tokens}/{checked_requests}",
    "near ties": "{near_ties}",
    "rounds": "{timed_rounds}",
}
POLICIES = {
    "policy": "{policy}",
    "batch": "{batch_size}",
    "tokens/s": "{tokens_per_s:,.1f}",
    "x sequential": "{speedup:.2f}",
    "latency mean s": "{latency_mean_s:.2f}",
    "TTFT P95 ms": "{ttft_p95_ms:,.0f}",
    "GPU %": "{gpu_util_pct:.0f}",
    "GPU MiB": "{gpu_peak_mib:,.0f}",
    "padding": "{padding_ratio:.1%}",
    "passes": "{forward_passes:,}",
}
SCALE = {
    "model": "{model}",
    "alone tokens/s": "{sequential_tokens_per_s:,.1f}",
    "tokens/s": "{tokens_per_s:,.1f}",
    "speed-up": "{speedup:.2f}",
    "demonstrated": "{demonstrated:.2f}",
    "GPU MiB": "{gpu_peak_mib:,.0f}",
}
# What the demonstration project reported.
DEMONSTRATED = "demonstration: one A100-40GB, float16, batch 16, 128 tokens in and 256 out"
_KEYS = (
    "policy",
    "batch_size",
    "tokens_per_s",
    "speedup",
    "latency_mean_ms",
    "gpu_util_pct",
    "gpu_peak_bytes",
)
_REPORTED = (
    ("demonstration batch=1", 1, 68.0, 1.0, 3200.0, 45, 8.2e9),
    ("demonstration dynamic", 16, 501.0, 7.37, 450.0, 89, 7.8e9),
)
DEMONSTRATION: list[Info] = [dict(zip(_KEYS, row, strict=True)) for row in _REPORTED]
SPEEDUPS = {"random:qwen2-1.5b": 7.37, "random:llama-7b": 6.17, "random:mistral-7b": 5.89}


def tables(recorded: Sequence[Info]) -> Iterator[tuple[str, RenderableType]]:
    """A title and a table for each group that is worth one of its own."""
    for device in ("cpu", "cuda"):
        for group, make in (("peers", _peers), ("policy", _policies), ("scale", _scale)):
            rows = [info for info in recorded if info["group"] == group and info["device"] == device]
            if rows:
                yield make(rows)


def _peers(rows: Sequence[Info]) -> tuple[str, RenderableType]:
    what = "{workload} on {model}, {dtype}, {device}, batch {batch_size}".format_map(rows[0])
    return f"peers: {what}", _table(PEERS, rows)


def _policies(rows: Sequence[Info]) -> tuple[str, RenderableType]:
    base = next((info["tokens_per_s"] for info in rows if info["policy"] == "sequential"), None)
    ours = [{**info, "speedup": info["tokens_per_s"] / base if base else None} for info in rows]
    title = "policies: {workload} on {model}, {dtype}, {device}".format_map(rows[0])
    if "tiny" in rows[0]["model"]:  # says nothing of a real model
        return title, _table(POLICIES, ours)
    return title, Group(_table(POLICIES, [*ours, *DEMONSTRATION]), Text(DEMONSTRATED))


def _scale(rows: Sequence[Info]) -> tuple[str, RenderableType]:
    beside = [{**info, "demonstrated": SPEEDUPS.get(info["model"])} for info in rows]
    title = "model scale: continuous at batch 16 over one request alone, {device}".format_map(rows[0])
    return title, Group(_table(SCALE, beside), Text(DEMONSTRATED))


def _table(columns: Mapping[str, str], rows: Sequence[Info]) -> RenderableType:
    heading = list(columns)
    cells = [[_cell(form, _derived(info)) for form in columns.values()] for info in rows]

    def make(room: int) -> RenderableType:
        shown = [[middle(clean(first), name_length(room)), *others] for first, *others in cells]
        return table(heading, shown, heading[1:], room)

    return Fitted(make)


def _derived(info: Info) -> Info:
    """A record with its bytes in MiB, its seconds, and the count of its rounds."""
    peak, mean = info.get("gpu_peak_bytes"), info.get("latency_mean_ms")
    rounds = len(info.get("rounds", {}).get("tokens_per_s", ()))
    derived = {"gpu_peak_mib": peak and peak / 2**20, "latency_mean_s": mean and mean / 1e3}
    return {**info, **derived, "timed_rounds": rounds}


def _cell(form: str, info: Info) -> str:
    """A cell, or "-" where a value of it was not recorded."""
    keys = [name for _, name, _, _ in Formatter().parse(form) if name]
    return "-" if any(info.get(key) is None for key in keys) else form.format_map(info)
