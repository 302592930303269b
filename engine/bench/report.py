"""Runs as data: a summary, CSV with a row a request, JSON with everything; and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from engine.bench.compare import Run


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a (policy, batch size), taken from its round of median tokens/s (of two, the slower).

    Besides all of `EngineMetrics.flat`: `rounds`, `speedup` (tokens/s over sequential's, or the first row's
    where it was not run), `same_tokens` (how many requests gave exactly the tokens they gave there) and
    `copied_bytes`.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.policy, run.batch_size), []).append(run)
    medians = [
        sorted(group, key=lambda r: r.metrics.tokens_per_s)[(len(group) - 1) // 2]
        for group in groups.values()
    ]
    base = next((run for run in medians if run.policy == "sequential"), medians[0])
    frame = pd.DataFrame([run.metrics.flat() for run in medians])
    same = [
        sum(a.token_ids == b.token_ids for a, b in zip(r.outputs, base.outputs, strict=True)) for r in medians
    ]
    speedup = frame["tokens_per_s"] / base.metrics.tokens_per_s
    copied = [run.copied_bytes for run in medians]
    rounds = [*map(len, groups.values())]
    what = pd.DataFrame(list(groups), columns=["policy", "batch_size"])
    what = what.assign(rounds=rounds, speedup=speedup, same_tokens=same, copied_bytes=copied)
    return pd.concat([what, frame], axis=1)


def requests_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row a request of every run: `policy`, `batch_size`, `run` (a number), then its metrics."""
    frames = {(run.policy, run.batch_size, i): run.metrics.frame() for i, run in enumerate(runs)}
    return pd.concat(frames, names=["policy", "batch_size", "run"]).droplevel(-1).reset_index()


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
