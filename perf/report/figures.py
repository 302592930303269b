"""Which charts a run deserves: from what its benchmarks recorded to lines and bars. It neither draws nor
judges.

A benchmark without a metric, or a run without a group, simply has no such chart: the page shows what was
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from perf.gate.metrics import METRICS, Metric
from perf.gate.saved_runs import Benchmark, Run
from perf.report.charts import Bar, Chart, Line
from perf.report.markup import number
from perf.report.verdicts import value

NAMED = ("policy", "backend", "model", "device", "dtype", "runner")  # what tells lines apart
SIZED = ("batch_size", "prompt_tokens", "context", "prefix_caching")  # and, among bars, these too
PERCENTILES = ("p50", "p95", "p99")
TIMES = {"ttft": "time to first token", "tpot": "time per output token", "latency": "from due to finished"}
# group -> metric, title, what it says, value of a full bar, what else: a metric, or a policy to divide by
BARS = {
    "policy": ("tokens_per_s", "Policies", "output tokens/s on one workload", None, "sequential"),
    "peers": ("tokens_per_s", "Peers", "output tokens/s (and times this engine's)", None, "ratio_to_engine"),
    "scale": (
        "tokens_per_s",
        "Model scale",
        "output tokens/s (and times one request at a time)",
        None,
        "speedup",
    ),
    "decode": ("decode_bandwidth_pct", "Decode roofline", "% of the measured copy bandwidth", 100.0, None),
    "prefill": ("prefill_mfu_pct", "Prefill roofline", "% of the measured matmul rate", 100.0, None),
    "prefix": ("ttft_p50_ms", "Prefix reuse", "TTFT P50; less is better", None, None),
    "memory": ("batch_size_max", "KV memory", "most requests at once in the same memory", None, None),
    "startup": ("startup_s", "Start-up", "to load, warm up and capture; less is better", None, None),
}


def sections(head: Run, base: Run | None = None) -> dict[str, list[Chart]]:
    """Charts of `head` by section heading, sections without any left out; `base`'s values are shown beside
    it."""
    found = {
        "Throughput": [*_by_batch(head, base), *_bars(head, base, "policy", "peers", "scale")],
        "Latency": _percentiles(head, "batch_size", "batch_size", "requests at a time"),
        "Open load": [*_open_load(head), *_percentiles(head, "load", "offered_rate", "offered requests/s")],
        "How far from the limit": _bars(head, base, "decode", "prefill"),
        "Memory and start-up": _bars(head, base, "memory", "prefix", "startup"),
    }
    return {heading: charts for heading, charts in found.items() if charts}


def history(runs: Sequence[Run]) -> tuple[list[tuple[Benchmark, str, list[float]]], int]:
    """Per benchmark and gated time metric of the last run its value in each run, oldest first, where there
    are two.

    Only runs with the last one's fingerprint count; the second result is how many values that left out.
    """
    series, left_out = [], 0
    for name, last in runs[-1].benchmarks.items():
        past = [run.benchmarks[name] for run in runs if name in run.benchmarks]
        same = [benchmark for benchmark in past if benchmark.fingerprint == last.fingerprint]
        left_out += len(past) - len(same)
        for metric in last.rounds:
            values = [found for b in same if (found := value(b, metric)) is not None]
            if len(values) > 1 and METRICS[metric].direction != "exact":
                series.append((last, metric, values))
    return series, left_out


def labels(benchmarks: Iterable[Benchmark], keys: Sequence[str]) -> Callable[[Benchmark], str]:
    """How to call each of these: by the sizes in which they differ, and the fewest others of `keys` that are
    needed."""
    known, chosen = list(benchmarks), list[str]()

    def shown(b: Benchmark, key: str) -> str:
        return number(b.info.get(key))

    for key in keys:
        kinds = [len({tuple(shown(b, k) for k in some) for b in known}) for some in (chosen, [*chosen, key])]
        if kinds[1] > kinds[0] or (key in SIZED and len({shown(b, key) for b in known}) > 1):
            chosen.append(key)

    def label(b: Benchmark) -> str:
        parts = [(key, number(b.info[key])) for key in chosen if b.info.get(key) is not None]
        words = [f"{key.replace('_', ' ')} {name}" if key in SIZED else name for key, name in parts]
        return ", ".join(words) or number(b.info.get("policy") or b.fullname.split("::")[-1])

    return label


def _group(run: Run | None, group: str, *keys: str) -> list[Benchmark]:
    """A run's benchmarks of a group that have all of these numbers."""
    some = run.benchmarks.values() if run else ()
    return [b for b in some if b.group == group and all(value(b, key) is not None for key in keys)]


def _ways(benchmarks: list[Benchmark], like: list[Benchmark] | None = None) -> dict[str, list[Benchmark]]:
    """The benchmarks by their label, labelled as `like` are."""
    label = labels(like or benchmarks, NAMED)
    return {
        name: [b for b in benchmarks if label(b) == name] for name in dict.fromkeys(map(label, benchmarks))
    }


def _line(name: str, benchmarks: Iterable[Benchmark], x: str, y: str, of: str | None = None) -> Line:
    """One line through what these recorded of x and y, in the order of offered load or of x."""
    points = [(value(b, "offered_rate") or 0.0, value(b, x), value(b, y)) for b in benchmarks]
    kept = sorted((rate, px, py) for rate, px, py in points if px is not None and py is not None)
    return Line(name, tuple((px, py) for _, px, py in kept), of)


def _by_batch(head: Run, base: Run | None) -> list[Chart]:
    x, y = "batch_size", "tokens_per_s"
    shown, earlier = _group(head, x, x, y), _group(base, x, x, y)
    lines = [_line(name, some, x, y) for name, some in _ways(shown).items()]
    if base and lines:
        lines += [
            _line(f"{name} ({base.name})", some, x, y, name) for name, some in _ways(earlier, shown).items()
        ]
    says = "output tokens/s against requests at a time"
    return [Chart("Throughput", says, "tokens/s", "batch size", tuple(lines), log_x=True)] if lines else []


def _percentiles(run: Run, group: str, x: str, x_label: str) -> list[Chart]:
    """A chart a latency and a way of running, with a line a percentile."""
    charts, ways = [], _ways(_group(run, group, x))
    for way, some in ways.items():
        for metric, says in TIMES.items():
            drawn = [_line(p.upper(), some, x, f"{metric}_{p}_ms") for p in PERCENTILES]
            lines = tuple(line for line in drawn if line.points)
            if lines:
                title = f"{'Latency' if metric == 'latency' else metric.upper()}, ms"
                title += f": {way}" if len(ways) > 1 else ""
                heights = [y for line in lines for _, y in line.points]
                wide = max(heights) > 30 * min(heights)
                charts.append(Chart(title, says, "ms", x_label, lines, log_x=x == "batch_size", log_y=wide))
    return charts


def _open_load(run: Run) -> list[Chart]:
    charts = []
    for way, some in _ways(_group(run, "load", "offered_rate", "tokens_per_s", "latency_p50_ms")).items():
        curve = tuple(_line(p.upper(), some, "tokens_per_s", f"latency_{p}_ms") for p in PERCENTILES)
        says = "latency, ms, at the throughput reached as the offered load grows"
        charts.append(Chart("Throughput and latency", f"{way}: {says}", "ms", "tokens/s", curve, log_y=True))
        good = _line("within the limits", some, "offered_rate", "goodput")
        if good.points:
            offered = Line("offered", tuple((rate, rate) for rate, _ in good.points), good.name)
            limits = [
                f"{name.upper()} {number(some[0].info.get(f'slo_{name}_ms'))} ms" for name in ("ttft", "tpot")
            ]
            says = f"{way}: requests/s that met {' and '.join(limits)}"
            charts.append(Chart("Goodput", says, "requests/s", "offered requests/s", (good, offered)))
    return charts


def _bars(head: Run, base: Run | None, *groups: str) -> list[Chart]:
    charts = []
    for group in groups:
        metric, title, says, full, beside = BARS[group]
        shown = _group(head, group, metric)
        label = labels(shown, (*NAMED, *SIZED, "workload"))
        before = {b.fullname: value(b, metric) for b in _group(base, group, metric)}
        one = [value(b, metric) for b in shown if b.info.get("policy") == beside]
        bars = []
        for b in shown:
            now = value(b, metric) or 0.0
            ratio = now / one[0] if one and one[0] else value(b, beside or "")
            bars.append(
                Bar(label(b), now, before.get(b.fullname), f"({ratio:.2f}x)" if ratio is not None else "")
            )
        if bars:
            form = _with_unit(METRICS[metric]) if metric in METRICS else number
            charts.append(Chart(title, says, says, bars=tuple(bars), full=full, form=form))
    return charts


def _with_unit(metric: Metric) -> Callable[[float | None], str]:
    unit = "" if metric.unit in ("bytes", "tok/s") else f" {metric.unit}"
    return lambda x: "-" if x is None else f"{metric.format(x)}{unit}"
