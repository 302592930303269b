"""A summary as a table for the terminal: which columns, in which order and units, and notes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from engine.bench.options import GENERATE
from engine.output import Column

# In the order shown. Of a lower rank is what a narrow terminal keeps longer.
COLUMNS: Sequence[tuple[str, str, str, int]] = (  # heading, name in the summary, format or "time", rank
    ("policy", "policy", "{}", 0),
    ("batch", "batch_size", "{}", 0),
    ("tok/s", "tokens_per_s", "{:,.1f}", 0),
    ("speed-up", "speedup", "{:.2f}x", 1),
    ("TTFT\nP50", "ttft_p50_ms", "time", 2),
    ("TTFT\nP95", "ttft_p95_ms", "time", 4),
    ("TPOT\nP50", "tpot_p50_ms", "time", 5),
    ("TPOT\nP95", "tpot_p95_ms", "time", 8),
    ("latency\nP50", "latency_p50_ms", "time", 6),
    ("latency\nP95", "latency_p95_ms", "time", 7),
    ("prefill\nmean", "prefill_mean_ms", "time", 11),
    ("decode\nmean", "decode_mean_ms", "time", 12),
    ("padding", "padding_ratio", "{:.1%}", 9),
    ("forward\npasses", "forward_passes", "{:,}", 10),
    ("host\n%", "host_pct", "{:.1f}", 13),
    ("same\ntokens", "same_tokens", "{}", 3),
)
S_FROM_MS = 1000.0  # times are in seconds where the longest of their metric takes one


def columns(summary: pd.DataFrame) -> list[Column]:
    """Return the columns of the table, a cell a row of the summary; "-" stands for what was not measured."""
    return [_column(summary, *column) for column in COLUMNS]


def _column(summary: pd.DataFrame, heading: str, name: str, form: str, rank: int) -> Column:
    """Return one of COLUMNS."""
    unit, values = "", summary[name].tolist()
    if form == "time":
        metric = name.partition("_")[0]  # whose P50 and P95 have one unit
        times = summary[[known for _, known, _, _ in COLUMNS if known.partition("_")[0] == metric]]
        unit, scale, decimals = unit_of(times.to_numpy(float).ravel().tolist())
        values = [value if pd.isna(value) else value / scale for value in values]
        form = f"{{:,.{decimals}f}}"
    elif name == "same_tokens":
        form = f"{{}}/{summary['requests'].max()}"
    cells = ["-" if pd.isna(value) else form.format(value) for value in values]
    return Column(heading, cells, unit, rank, is_text=name == "policy")


def unit_of(times_ms: Iterable[float]) -> tuple[str, float, int]:
    """Return the unit that suits these times, how many ms it has, and how many decimals.

    The shortest time has two digits, unless that takes more than two decimals: then it has one.
    """
    known = [time for time in times_ms if time and not math.isnan(time)]
    unit, scale, fewest = ("s", 1e3, 1) if max(known, default=0.0) >= S_FROM_MS else ("ms", 1.0, 0)
    if not known:
        return unit, scale, fewest
    first_digit = -math.floor(math.log10(min(known) / scale))
    return unit, scale, max(fewest, first_digit, min(first_digit + 1, 2))


def notes(summary: pd.DataFrame, environment: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: what memory was held, how much of it for nothing, random weights."""
    held = {"weights": environment["weight_bytes"], "their packed copies": summary["copied_bytes"].max()}
    held |= {"KV": summary["kv_bytes_peak"].max(), "peak RSS": environment["peak_rss_bytes"]}
    held |= {"peak CUDA": environment["peak_cuda_bytes"]}
    lines = ["memory in MiB: " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in held.items())]
    unused = summary[summary["policy"] != GENERATE].groupby("policy", sort=False)["kv_unused_mean"].mean()
    if len(unused):
        waste = ", ".join(f"{policy} {positions:,.1f}" for policy, positions in unused.items())
        lines.append(f"KV positions that a request held without need, on average: {waste}")
    if environment["model"].startswith("random:"):
        lines.append("weights are random: speed does not depend on their values, text would be noise")
    return lines


def caption(summary: pd.DataFrame) -> str:
    """Return what the table's words mean, in a line or two."""
    base = "sequential" if "sequential" in set(summary["policy"]) else "the first row"
    return (
        f"{summary['requests'].max()} requests a row. speed-up: tok/s over that of {base}. TTFT: from "
        "arrival to first token. TPOT: time per token after it. same tokens: requests whose tokens are those "
        f"of {base}."
    )
