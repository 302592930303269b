"""Runs as data (a summary, CSV with a row a request, JSON with everything), as a table, and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from engine.bench.options import GENERATE, BenchOptions
from engine.output import Column, Output

if TYPE_CHECKING:
    from engine.bench.compare import Run

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


def show(runs: Sequence[Run], options: BenchOptions, environment: dict[str, Any]) -> None:
    """Show runs as a table and write the files that the options name."""
    on = f"{options.model} ({environment['dtype']}, {environment['device']})"
    title = f"{environment['workload']}, arrivals {environment['arrivals']}, on {on}"
    summary, out = summarise(runs), Output()
    below = [caption(summary), *notes(summary, environment)]
    out.show(columns(summary), title, below, "--wide shows every column", options.wide)
    if options.csv:
        requests_frame(runs).to_csv(options.csv, index=False)
    if options.json:
        write_json(options.json, runs, environment)
    if options.plot:
        write_plot(options.plot, summary, title)
    out.close()


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a (policy, batch size), taken from its round of median tokens/s (of two, the slower).

    Besides all of `EngineMetrics.flat`: `rounds`, `speedup` (tokens/s over sequential's, or the first row's
    where it was not run), `same_tokens` (how many requests gave exactly the tokens they gave there) and
    `copied_bytes`.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.metrics.tokens_per_s):
        groups.setdefault((run.policy, run.batch_size), []).append(run)
    order = dict.fromkeys((run.policy, run.batch_size) for run in runs)
    medians = [groups[key][(len(groups[key]) - 1) // 2] for key in order]
    base = next((run for run in medians if run.policy == "sequential"), medians[0])
    rows = []
    for run in medians:
        pairs = zip(run.outputs, base.outputs, strict=True)
        flat = run.metrics.flat()
        row = {
            "policy": run.policy,
            "batch_size": run.batch_size,
            "rounds": len(groups[run.policy, run.batch_size]),
            "speedup": run.metrics.tokens_per_s / base.metrics.tokens_per_s,
            "same_tokens": sum(one.token_ids == other.token_ids for one, other in pairs),
            "copied_bytes": run.copied_bytes,
        }
        rows.append(row | flat)
    return pd.DataFrame(rows)


def requests_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a request of every run: `policy`, `batch_size`, `run` (a number), then its metrics."""
    frames = {(run.policy, run.batch_size, i): run.metrics.frame() for i, run in enumerate(runs)}
    return pd.concat(frames, names=["policy", "batch_size", "run"]).droplevel(-1).reset_index()


def columns(summary: pd.DataFrame) -> list[Column]:
    """Return the columns of the table, a cell a row of the summary; "-" stands for what was not measured."""
    return [_column(summary, *column) for column in COLUMNS]


def _column(summary: pd.DataFrame, heading: str, name: str, form: str, rank: int) -> Column:
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
    """Return the lines below the table: what memory was held, how much of it for nothing, random weights, and
    why tokens may be others."""
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
    dtype, same = environment["dtype"], (summary["same_tokens"] == summary["requests"]).all()
    if dtype in ("bfloat16", "float16") and not same:
        lines.append(f"in {dtype} the two likeliest tokens often tie within rounding: either may be taken")
    return lines


def caption(summary: pd.DataFrame) -> str:
    """Return what the table's words mean, in a line or two."""
    base = "sequential" if "sequential" in set(summary["policy"]) else "the first row"
    return (
        f"{summary['requests'].max()} requests a row. speed-up: tok/s over that of {base}. TTFT: from "
        "arrival to first token. TPOT: time per token after it. same tokens: requests whose tokens are those "
        f"of {base}."
    )


def write_json(path: Path, runs: Sequence[Run], environment: dict[str, Any]) -> None:
    """Write `environment`, `summary` (a row a policy and batch size), `requests` (one a request and run)."""
    frames = {"summary": summarise(runs), "requests": requests_frame(runs)}
    rows = {name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()}
    path.write_text(json.dumps({"environment": environment, **rows}, indent=1) + "\n")


def write_plot(path: Path, summary: pd.DataFrame, title: str) -> None:
    """Draw throughput, TTFT and latency, a row of bars a policy and batch size, as the file's ending says."""
    from matplotlib.figure import Figure

    bars = summary.set_index(summary["policy"] + ", " + summary["batch_size"].astype(str))
    figure = Figure(figsize=(11, 1.2 + 0.36 * len(bars)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    throughput, ttft, latency = figure.subplots(1, 3, sharey=True)
    bars["tokens_per_s"].plot.barh(ax=throughput, color="#2a6f97", width=0.8)
    throughput.bar_label(
        throughput.containers[0], [f" {value:.2f}x" for value in bars["speedup"]], fontsize=8
    )
    throughput.margins(x=0.15)
    for axis, metric in ((ttft, "ttft"), (latency, "latency")):
        pair = bars[[f"{metric}_p50_ms", f"{metric}_p95_ms"]].set_axis(["P50", "P95"], axis=1) / 1e3
        pair.plot.barh(ax=axis, color=["#61a5c2", "#013a63"], width=0.8).legend(fontsize=8)
    for axis, heading in ((throughput, "output tokens / s"), (ttft, "TTFT, s"), (latency, "latency, s")):
        axis.set_title(heading, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    latency.invert_yaxis()  # of all three, after pandas has set its limits
    figure.savefig(path, dpi=150)
