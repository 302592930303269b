"""Tables for the end of a pytest session: what was just measured, side by side. The reports are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from perf.report.text import clean, middle

NAME_LENGTH = 60  # characters of what the first column names
Info = dict[str, Any]
Cell = Callable[[Info], str]


def tables(recorded: Sequence[Info]) -> Iterator[tuple[str, list[str]]]:
    """A title and lines for each group that is worth a table of its own."""
    for device in ("cpu", "cuda"):
        for group, table in (("peers", _peers), ("policy", _policies), ("scale", _scale)):
            rows = [info for info in recorded if info["group"] == group and info["device"] == device]
            if rows:
                yield table(rows)


def _peers(rows: Sequence[Info]) -> tuple[str, list[str]]:
    what = "{workload} on {model}, {dtype}, {device}, batch {batch_size}".format_map(rows[0])
    return f"peers: {what}", lines(rows, PEERS)


def _policies(rows: Sequence[Info]) -> tuple[str, list[str]]:
    base = next((info["tokens_per_s"] for info in rows if info["policy"] == "sequential"), None)
    ours = [{**info, "speedup": info["tokens_per_s"] / base if base else None} for info in rows]
    title = "policies: {workload} on {model}, {dtype}, {device}".format_map(rows[0])
    if "tiny" in rows[0]["model"]:  # says nothing of a real model
        return title, lines(ours, POLICIES)
    return title, [*lines([*ours, *DEMONSTRATION], POLICIES), DEMONSTRATED]


def _scale(rows: Sequence[Info]) -> tuple[str, list[str]]:
    beside = [{**info, "demonstrated": SPEEDUPS.get(info["model"])} for info in rows]
    title = "model scale: continuous at batch 16 over one request alone, {device}".format_map(rows[0])
    return title, [*lines(beside, SCALE), DEMONSTRATED]


def number(key: str, form: str) -> Cell:
    """A cell that shows one value, or "-" where there is none."""
    return lambda info: "-" if info.get(key) is None else form.format(info[key])


PEERS: dict[str, Cell] = {
    "backend": lambda info: str(info["backend"]),
    "tokens/s": number("tokens_per_s", "{:,.1f}"),
    "x engine": number("ratio_to_engine", "{:.3f}"),
    "TTFT P95 ms": number("ttft_p95_ms", "{:,.0f}"),
    "TPOT P50 ms": number("tpot_p50_ms", "{:,.1f}"),
    "latency P95 ms": number("latency_p95_ms", "{:,.0f}"),
    "FLOPs %": number("useful_flops_pct", "{:.1f}"),
    "same tokens": lambda info: f"{info['same_tokens']}/{info['checked_requests']}",
    "near ties": number("near_ties", "{}"),
    "rounds": lambda info: str(len(info["rounds"]["tokens_per_s"])),
}


def mebibytes(key: str) -> Cell:
    """A cell that shows bytes in MiB."""
    return lambda info: "-" if info.get(key) is None else f"{info[key] / 2**20:,.0f}"


POLICIES: dict[str, Cell] = {
    "policy": lambda info: str(info["policy"]),
    "batch": number("batch_size", "{}"),
    "tokens/s": number("tokens_per_s", "{:,.1f}"),
    "x sequential": number("speedup", "{:.2f}"),
    "latency mean s": lambda info: f"{info['latency_mean_ms'] / 1e3:.2f}",
    "TTFT P95 ms": number("ttft_p95_ms", "{:,.0f}"),
    "GPU %": number("gpu_util_pct", "{:.0f}"),
    "GPU MiB": mebibytes("gpu_peak_bytes"),
    "padding": number("padding_ratio", "{:.1%}"),
    "passes": number("forward_passes", "{:,}"),
}
SCALE: dict[str, Cell] = {
    "model": lambda info: str(info["model"]),
    "alone tokens/s": number("sequential_tokens_per_s", "{:,.1f}"),
    "tokens/s": number("tokens_per_s", "{:,.1f}"),
    "speed-up": number("speedup", "{:.2f}"),
    "demonstrated": number("demonstrated", "{:.2f}"),
    "GPU MiB": mebibytes("gpu_peak_bytes"),
}
# What the demonstration project reported.
DEMONSTRATED = "demonstration: one A100-40GB, float16, batch 16, 128 tokens in and 256 out"
_REPORTED: list[tuple[str, int, float, float, float, int, float]] = [
    ("demonstration batch=1", 1, 68.0, 1.0, 3200.0, 45, 8.2),
    ("demonstration dynamic", 16, 501.0, 7.37, 450.0, 89, 7.8),
]
DEMONSTRATION: list[Info] = [
    {"policy": name, "batch_size": batch, "tokens_per_s": rate, "speedup": ratio, "latency_mean_ms": latency,
     "gpu_util_pct": util, "gpu_peak_bytes": gigabytes * 1e9}
    for name, batch, rate, ratio, latency, util, gigabytes in _REPORTED
]  # fmt: skip
SPEEDUPS = {"random:qwen2-1.5b": 7.37, "random:llama-7b": 6.17, "random:mistral-7b": 5.89}


def lines(rows: Sequence[Info], columns: dict[str, Cell]) -> list[str]:
    """A table as text: the first column to the left, the others to the right."""
    shown = ([middle(clean(cell(row)), NAME_LENGTH) for cell in columns.values()] for row in rows)
    cells = [list(columns), *shown]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    return [
        "  ".join(text.ljust(width) if at == 0 else text.rjust(width)
                  for at, (text, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]  # fmt: skip
