"""Which charts a run deserves: from what its benchmarks recorded to lines and bars. It neither draws nor judges.

A benchmark without a metric, or a run without a group, simply has no such chart: the page shows what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perf.metrics import METRICS, Metric
from perf.report.charts import Bar, Chart, Line
from perf.report.markup import number
from perf.runs import Benchmark, Run

NAMED = ("backend", "model", "policy", "runner", "dtype", "device", "workload")  # what tells lines apart
SIZED = ("batch_size", "prompt_tokens", "context_tokens", "offered_rate")  # and, among bars, these too
PERCENTILES = ("p50", "p95", "p99")
TIMES = {"ttft": "time to first token", "tpot": "time per output token", "latency": "from due to finished"}
BARS = {  # group -> metric, title, what it says, value of a full bar, what the others are compared with
    "policy": ("tokens_per_s", "Policies", "output tokens/s on one workload", None, "sequential"),
    "peers": ("tokens_per_s", "Peers", "output tokens/s: same model, tokens in and tokens out", None, "generate"),
    "scale": ("tokens_per_s", "Model scale", "output tokens/s", None, None),
    "decode": ("decode_bandwidth_pct", "Decode roofline", "% of the measured copy bandwidth", 100.0, None),
    "prefill": ("prefill_mfu_pct", "Prefill roofline", "% of the measured matmul rate", 100.0, None),
    "prefix": ("ttft_p50_ms", "Prefix reuse", "TTFT P50; less is better", None, None),
    "memory": ("kv_bytes_peak", "KV memory", "most of it in use at once; less is better", None, None),
    "startup": ("startup_s", "Start-up", "to load, warm up and capture; less is better", None, None),
}
Labels = Callable[[Benchmark], str]


def sections(head: Run, base: Run | None = None) -> dict[str, list[Chart]]:
    """Charts of `head` by section heading, sections without any left out; `base`'s values are drawn faintly behind."""
    found = {
        "Throughput": [*_by_batch(head, base), *_bars(head, base, "policy", "peers", "scale")],
        "Latency": _percentiles(head, "batch_size", "batch_size", "requests at a time"),
        "Open load": _open_load(head),
        "How far from the limit": _bars(head, base, "decode", "prefill"),
        "Memory and start-up": _bars(head, base, "memory", "prefix", "startup"),
    }
    return {heading: charts for heading, charts in found.items() if charts}


def history(runs: Sequence[Run]) -> tuple[list[tuple[Benchmark, str, list[float]]], int]:
    """Per benchmark and gated time metric of the last run its value in each run, oldest first, where there are two.

    Only runs with the last one's fingerprint count; the second result is how many values that left out.
    """
    series, left_out = [], 0
    for name, last in runs[-1].benchmarks.items():
        past = [run.benchmarks[name] for run in runs if name in run.benchmarks]
        same = [benchmark for benchmark in past if benchmark.fingerprint == last.fingerprint]
        left_out += len(past) - len(same)
        for metric in last.rounds:
            values = [value for b in same if (value := _value(b, metric)) is not None]
            if len(values) > 1 and METRICS[metric].direction != "exact":
                series.append((last, metric, values))
    return series, left_out


def labels(benchmarks: Iterable[Benchmark], keys: Sequence[str]) -> Labels:
    """How to call each of these: by those of `keys` in which they differ, else by policy or test."""
    known = list(benchmarks)
    differ = [key for key in keys if len({b.info.get(key) for b in known}) > 1]

    def label(benchmark: Benchmark) -> str:
        parts = [(key, benchmark.info.get(key)) for key in differ]
        words = [number(v) if key in NAMED else f"{key.split('_')[0]} {number(v)}" for key, v in parts if v is not None]
        return ", ".join(dict.fromkeys(words)) or str(
            benchmark.info.get("policy") or benchmark.fullname.split("::")[-1]
        )

    return label


def _value(benchmark: Benchmark, key: str) -> float | None:
    value = benchmark.info.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _group(run: Run | None, group: str, *keys: str) -> list[Benchmark]:
    """A run's benchmarks of a group that have all of these numbers."""
    some = run.benchmarks.values() if run else ()
    return [b for b in some if b.group == group and all(_value(b, key) is not None for key in keys)]


def _line(name: str, benchmarks: Iterable[Benchmark], x: str, y: str, of: str | None = None) -> Line:
    """One line through what these recorded of x and y, in the order of offered load or of x."""
    points = [(b.info.get("offered_rate") or b.info[x], b.info[x], b.info[y]) for b in benchmarks]
    kept: list[Any] = sorted(point for point in points if None not in point)
    return Line(name, tuple((float(px), float(py)) for _, px, py in kept), of)


def _by_batch(head: Run, base: Run | None) -> list[Chart]:
    shown = _group(head, "batch_size", "batch_size", "tokens_per_s")
    if not shown:
        return []
    label, lines = labels(shown, NAMED), []
    for run, benchmarks in ((head, shown), (base, _group(base, "batch_size", "batch_size", "tokens_per_s"))):
        for name in dict.fromkeys(map(label, benchmarks)):
            of = name if run is base else None
            some = [b for b in benchmarks if label(b) == name]
            lines.append(
                _line(f"{name} ({base.name})" if base and of else name, some, "batch_size", "tokens_per_s", of)
            )
    says = "output tokens/s against requests at a time"
    return [Chart("Throughput", says, "tokens/s", "batch size", tuple(lines), log_x=True)]


def _percentiles(run: Run, group: str, x: str, x_label: str) -> list[Chart]:
    """A chart a latency and a way of running, with a line a percentile."""
    shown, charts = _group(run, group, x), []
    label = labels(shown, NAMED)
    ways = list(dict.fromkeys(map(label, shown)))
    for way in ways:
        for metric, says in TIMES.items():
            some = [b for b in shown if label(b) == way and _value(b, f"{metric}_p50_ms") is not None]
            title = f"{metric.upper() if len(metric) == 4 else metric.title()}, ms{f': {way}' if len(ways) > 1 else ''}"
            lines = tuple(_line(p.upper(), some, x, f"{metric}_{p}_ms") for p in PERCENTILES)
            if some:
                heights = [y for line in lines for _, y in line.points]
                wide = max(heights) > 30 * max(min(heights), 1e-9)
                charts.append(Chart(title, says, "ms", x_label, lines, log_x=x == "batch_size", log_y=wide))
    return charts


def _open_load(run: Run) -> list[Chart]:
    shown, charts = _group(run, "load", "offered_rate", "tokens_per_s", "latency_p50_ms"), []
    label = labels(shown, NAMED)
    for way in dict.fromkeys(map(label, shown)):
        some = [b for b in shown if label(b) == way]
        curve = tuple(_line(p.upper(), some, "tokens_per_s", f"latency_{p}_ms") for p in PERCENTILES)
        says = "latency, ms, at the throughput reached as the offered load grows"
        charts.append(Chart("Throughput and latency", says, "ms", "tokens/s", curve, log_y=True))
        if good := [b for b in some if _value(b, "goodput") is not None]:
            rates = sorted(float(b.info["offered_rate"] or 0.0) for b in good)
            lines = (
                _line("within the limits", good, "offered_rate", "goodput"),
                Line("offered", tuple((r, r) for r in rates), "within the limits"),
            )
            limits = [
                f"{k[4:8].upper()} {number(good[0].info[k])} ms"
                for k in ("slo_ttft_ms", "slo_tpot_ms")
                if k in good[0].info
            ]
            says = f"requests/s that met {' and '.join(limits) or 'their limits'}"
            charts.append(Chart("Goodput", says, "requests/s", "offered requests/s", lines))
    return charts + _percentiles(run, "load", "offered_rate", "offered requests/s")


def _bars(head: Run, base: Run | None, *groups: str) -> list[Chart]:
    charts = []
    for group in groups:
        metric, title, says, full, against = BARS[group]
        shown = _group(head, group, metric)
        label, before = (
            labels(shown, NAMED + SIZED),
            {b.fullname: _value(b, metric) for b in _group(base, group, metric)},
        )
        first = next(
            (_value(b, metric) for b in shown if against in (b.info.get("policy"), b.info.get("backend"))), None
        )
        bars = []
        for benchmark in shown:
            value = _value(benchmark, metric) or 0.0
            note = f"({value / first:.2f}x)" if first else ""
            bars.append(Bar(label(benchmark), value, before.get(benchmark.fullname), note))
        if bars:
            charts.append(Chart(title, says, says, bars=tuple(bars), full=full, form=_with_unit(METRICS[metric])))
    return charts


def _with_unit(metric: Metric) -> Callable[[float | None], str]:
    unit = "" if metric.unit in ("bytes", "tok/s") else f" {metric.unit}"
    return lambda value: "-" if value is None else f"{metric.format(value)}{unit}"
