"""Figures of a run as a table, charts and history: chosen here, neither drawn nor judged.

A benchmark without a metric, or a run without a group, simply has no such chart: the page shows what was
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS, Metric
from perf.gate.saved_runs import Run
from perf.gate.steps import is_like
from perf.report.charts import Bar, Chart, Line
from perf.report.text import number
from perf.report.verdicts import named, shorten, value

TIMED = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "latency_p95_ms", "goodput")
RATES = ("decode_bandwidth_pct", "prefill_mfu_pct", "startup_s", "round_s", "forward_passes", "padded_tokens")
NAMED = ("policy", "backend", "model", "device", "dtype", "runner")  # what tells lines apart
SIZED = ("batch_size", "prompt_tokens", "context", "prefix_caching")  # and, among bars, these too
PERCENTILES = ("p50", "p95", "p99")
TIMES = {"ttft": "time to first token", "tpot": "time per output token", "latency": "from due to finished"}
# group -> metric, title, what it says, what else: a metric, or a policy to divide by
BARS = {
    "policy": ("tokens_per_s", "Policies", "output tokens/s on one workload", "sequential"),
    "peers": ("tokens_per_s", "Peers", "output tokens/s (and times this engine's)", "ratio_to_engine"),
    "scale": ("tokens_per_s", "Model scale", "output tokens/s (and times one request at a time)", "speedup"),
    "decode": ("decode_bandwidth_pct", "Decode roofline", "% of the measured copy bandwidth", ""),
    "prefill": ("prefill_mfu_pct", "Prefill roofline", "% of the measured matmul rate", ""),
    "prefix": ("ttft_p50_ms", "Prefix reuse", "TTFT P50; less is better", ""),
    "memory": ("batch_size_max", "KV memory", "most requests at once in the same memory", ""),
    "startup": ("startup_s", "Start-up", "to load, warm up and capture; less is better", ""),
}


def figures(run: Run, name_length: int | None = None) -> list[list[str]]:
    """A heading, then a row a benchmark with its main figures, but for those that no benchmark has."""
    short, metrics = shorten(run.benchmarks, name_length), [METRICS[name] for name in (*TIMED, *RATES)]
    rows = [
        [short[name], *(metric.format(value(b, metric.name)) for metric in metrics)]
        for name, b in run.benchmarks.items()
    ]
    return filled([["benchmark", *map(named, metrics)], *rows])


def filled(rows: list[list[str]]) -> list[list[str]]:
    """A table, its heading first, without the columns after the first that have a dash in every row."""
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def sections(head: Run, base: Run | None = None) -> dict[str, list[Chart]]:
    """Charts of `head` by section heading, `base`'s values beside its own; empty sections are left out."""
    found = {
        "Throughput": [*_by_batch(head, base), *_bars(head, base, "policy", "peers", "scale")],
        "Latency": _percentiles(head, "batch_size", "batch_size", "requests at a time"),
        "Open load": [*_open_load(head), *_percentiles(head, "load", "offered_rate", "offered requests/s")],
        "How far from the limit": _bars(head, base, "decode", "prefill"),
        "Memory and start-up": _bars(head, base, "memory", "prefix", "startup"),
    }
    return {heading: charts for heading, charts in found.items() if charts}


def history(runs: Sequence[Run]) -> tuple[list[tuple[Benchmark, str, list[float]]], int]:
    """The last run's benchmarks and gated time metrics that have two values or more in all runs, and those.

    Only runs of the same machine and work as the last one count; the second result is how many values that
    left out.
    """
    series, left_out = [], 0
    for name, last in runs[-1].benchmarks.items():
        past = [run.benchmarks[name] for run in runs if name in run.benchmarks]
        same = [benchmark for benchmark in past if is_like(benchmark, last)]
        left_out += len(past) - len(same)
        for metric in last.rounds:
            values = [found for b in same if (found := value(b, metric)) is not None]
            if len(values) > 1 and not METRICS[metric].is_counter:
                series.append((last, metric, values))
    return series, left_out


def labels(benchmarks: Iterable[Benchmark], keys: Sequence[str]) -> Callable[[Benchmark], str]:
    """A function that names each of these: by the sizes that differ, and the fewest other `keys` needed."""
    known, chosen = list(benchmarks), list[str]()

    def kinds(*some: str) -> int:
        return len({tuple(number(b.info.get(key)) for key in some) for b in known})

    for key in keys:
        if kinds(*chosen, key) > kinds(*chosen) or (key in SIZED and kinds(key) > 1):
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


def _by_label(benchmarks: list[Benchmark], like: list[Benchmark] | None = None) -> dict[str, list[Benchmark]]:
    """The benchmarks by their label, labelled as `like` are."""
    label = labels(like or benchmarks, NAMED)
    found: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        found.setdefault(label(benchmark), []).append(benchmark)
    return found


def _line(name: str, benchmarks: Iterable[Benchmark], x: str, y: str, of: str | None = None) -> Line:
    """One line through what these recorded of x and y, in the order of offered load or of x."""
    points = [(value(b, "offered_rate") or 0.0, value(b, x), value(b, y)) for b in benchmarks]
    kept = sorted((rate, px, py) for rate, px, py in points if px is not None and py is not None)
    return Line(name, tuple((px, py) for _, px, py in kept), of)


def _by_batch(head: Run, base: Run | None) -> list[Chart]:
    x, y = "batch_size", "tokens_per_s"
    shown, earlier = _group(head, x, x, y), _group(base, x, x, y)
    now = {name: _line(name, some, x, y) for name, some in _by_label(shown).items()}
    if not now:
        return []
    before, beside = [], f" ({base.name})" if base else ""
    for name, some in _by_label(earlier, shown).items():
        before.append(_line(name + beside, some, x, y, name if name in now else None))
    says = "output tokens/s against requests at a time"
    return [Chart("Throughput", says, "tokens/s", "batch size", (*now.values(), *before), log_x=True)]


def _percentiles(run: Run, group: str, x: str, x_label: str) -> list[Chart]:
    """A chart a latency and a way of running, with a line a percentile."""
    charts, ways = [], _by_label(_group(run, group, x))
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
    ways = _by_label(_group(run, "load", "offered_rate", "tokens_per_s", "latency_p50_ms"))
    for way, some in ways.items():
        drawn = [_line(p.upper(), some, "tokens_per_s", f"latency_{p}_ms") for p in PERCENTILES]
        curve = tuple(line for line in drawn if line.points)
        says = f"{way}: latency, ms, at the throughput reached as the offered load grows"
        charts.append(Chart("Throughput and latency", says, "ms", "tokens/s", curve, log_y=True))
        good = _line("within the limits", some, "offered_rate", "goodput")
        if good.points:
            offered = Line("offered", tuple((rate, rate) for rate, _ in good.points), good.name)
            ttft, tpot = (number(some[0].info.get(f"slo_{name}_ms")) for name in ("ttft", "tpot"))
            says = f"{way}: requests/s that met TTFT {ttft} ms and TPOT {tpot} ms"
            charts.append(Chart("Goodput", says, "requests/s", "offered requests/s", (good, offered)))
    return charts


def _bars(head: Run, base: Run | None, *groups: str) -> list[Chart]:
    charts = []
    for group in groups:
        name, title, says, beside = BARS[group]
        shown = _group(head, group, name)
        label = labels(shown, (*NAMED, *SIZED, "workload"))
        before = {b.fullname: value(b, name) for b in _group(base, group, name)}
        one = next((value(b, name) for b in shown if b.info.get("policy") == beside), None)
        bars = []
        for b in shown:
            now = value(b, name) or 0.0
            ratio = now / one if one else value(b, beside)
            note = "" if ratio is None else f"({ratio:.2f}x)"
            bars.append(Bar(label(b), now, before.get(b.fullname), note))
        metric = METRICS.get(name)
        form, full = (_with_unit(metric), 100.0 if metric.unit == "%" else None) if metric else (number, None)
        if bars:
            charts.append(Chart(title, says, says, bars=tuple(bars), full=full, form=form))
    return charts


def _with_unit(metric: Metric) -> Callable[[float | None], str]:
    unit = "" if metric.unit in ("bytes", "tok/s") else f" {metric.unit}"
    return lambda x: "-" if x is None else f"{metric.format(x)}{unit}"
