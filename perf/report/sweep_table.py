"""A sweep as a terminal shows it, and as a picture: throughput against latency."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from perf.gate.metrics import METRICS
from perf.report.terminal import Fitted, table

if TYPE_CHECKING:
    from perf.measure.sweep import Curve, Point

HEADING = ("offered, req/s", "ended, req/s", "in the limits", "goodput", "tokens/s", "TTFT P50 / P95, ms",
           "TPOT P50 / P95, ms", "latency P95, s", "requests", "")  # fmt: skip


def sweep_table(curve: Curve) -> RenderableType:
    """Return the points by rising rate, and what they come to."""

    def make(room: int) -> RenderableType:
        rows = [_row(point, point is curve.best) for point in curve.points]
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in _limits(curve)) or "no limits"
        title = f"{curve.workload}, {limits}"
        return Group(table(HEADING, rows, HEADING[:-1], room, title), Text(conclusion(curve)))

    return Fitted(make)


def conclusion(curve: Curve) -> str:
    """Return the answer in a sentence or two."""
    best, lowest, highest = curve.best, curve.points[0].rate, curve.points[-1].rate
    if best is None:
        found = f"no rate met the limits for 99 % of its requests, not even {lowest:g} a second"
    elif best.rate == highest and curve.ended_by is None:
        found = f"every rate up to {highest:g} requests a second met the limits: offer more to find the end"
    else:
        found = f"{best.rate:g} requests a second are served within the limits (99 % of them)"
    ended = f"; {curve.ended_by}" if curve.ended_by else ""
    return f"{found}{ended}. All at once: {curve.capacity:.3g} requests a second."


def write_plot(path: Path, curve: Curve) -> None:
    """Draw output tokens a second against TTFT and TPOT (P95), a dot a rate, as the file's ending says.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(curve.workload, x=0.01, ha="left", fontsize=11)
    limits = dict(_limits(curve))
    for axis, name in zip(figure.subplots(1, 2), ("ttft", "tpot"), strict=True):
        known = [point for point in curve.points if point.info.get(f"{name}_p95_ms") is not None]
        across = [point.info["tokens_per_s"] for point in known]
        up = [point.info[f"{name}_p95_ms"] for point in known]
        axis.plot(across, up, color="#61a5c2", zorder=1)
        colours = ["#2a6f97" if point.met else "#c1121f" for point in known]
        axis.scatter(across, up, color=colours, zorder=2)
        for point, x, y in zip(known, across, up, strict=True):
            axis.annotate(f" {point.rate:g}/s", (x, y), fontsize=8)
        if name.upper() in limits:
            axis.axhline(limits[name.upper()], color="#888888", linestyle=":", linewidth=1)
        axis.set_xlabel("output tokens / s")
        axis.set_ylabel(f"{name.upper()} P95, ms")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _limits(curve: Curve) -> list[tuple[str, float]]:
    both = (("TTFT", curve.slo.ttft_ms), ("TPOT", curve.slo.tpot_ms))
    return [(name, limit) for name, limit in both if math.isfinite(limit)]


def _row(point: Point, best: bool) -> list[str]:
    info = point.info

    def pair(name: str) -> str:
        return f"{_cell(info.get(f'{name}_p50_ms'))} / {_cell(info.get(f'{name}_p95_ms'))}"

    latency = info.get("latency_p95_ms")
    said = "falls behind" if point.saturated else "the highest" if best else ""
    return [
        f"{point.rate:g}", f"{info['steady_ended_rate']:.3g}", f"{point.met_pct:.1f}%",
        METRICS["goodput"].format(info["goodput"]), f"{info['tokens_per_s']:,.1f}",
        pair("ttft"), pair("tpot"),
        "-" if latency is None else f"{latency / 1e3:,.2f}", f"{info['steady_requests']}", said,
    ]  # fmt: skip


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
