"""A comparison as people read it: the verdict in a line, then its rows by what a reader must do about them.

The terminal, Markdown and the page all take these words, so that they never say different things. It judges
nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from perf.gate.comparison import SESSIONS, Comparison, Outcome, Verdict
from perf.gate.entries import Benchmark
from perf.gate.metrics import Metric
from perf.gate.saved_runs import Run, short_commit
from perf.report.text import FLOAT_MAX, middle, signed, width

COLUMNS = ("benchmark", "metric", "base", "head", "change", "95 % interval", "allowed", "why")
RIGHT = ("base", "head", "change", "95 % interval", "allowed")
LINE_LENGTH, LINES = 1000, 20  # of notes that are made brief: characters of each, and how many


@dataclass(frozen=True)
class Part:
    """The verdicts of one kind; `folded` where nobody needs to read them."""

    heading: str
    count: int
    rows: tuple[tuple[str, ...], ...]  # cells of COLUMNS
    folded: bool = False


def parts(comparison: Comparison, name_length: int | None = None) -> list[Part]:
    """Regressions first, the unchanged last; kinds without a verdict are left out."""
    short = shorten((v.benchmark for v in comparison.verdicts), name_length)
    found: list[Part] = []
    for heading, outcome, improved in (
        ("Regressions", Outcome.FAIL, False),
        ("Not compared", Outcome.ERROR, False),
        ("Can't tell", Outcome.INCONCLUSIVE, False),
        ("Better", Outcome.PASS, True),
        ("Unchanged", Outcome.PASS, False),
    ):
        some = [v for v in comparison.verdicts if v.outcome is outcome and v.improved is improved]
        if some:
            found.append(Part(heading, len(some), tuple(_rows(some, short)), folded=heading == "Unchanged"))
    return found


def headline(comparison: Comparison) -> str:
    """The outcome with the count of each kind: `FAIL: 2 regressions, 1 can't tell, 81 unchanged`."""
    counts = ", ".join(f"{part.count} {part.heading.lower()}" for part in parts(comparison))
    found = f"{comparison.outcome}: {counts or 'nothing was compared'}"
    return found.replace(" 1 regressions", " 1 regression")


def title(run: Run, counted: bool = False) -> str:
    """A run's name, the commit it measured, and how many sessions it has if those are several.

    `+` marks a tree with uncommitted changes. With `counted` a single session is said to be one, too.
    """
    about = [commit] if (commit := short_commit(run, "")) else []
    if counted or run.sessions > 1:
        about.append(f"{run.sessions} session{'s' if run.sessions > 1 else ''}")
    return f"{run.name} ({', '.join(about)})" if about else run.name


def sides(comparison: Comparison) -> tuple[str, str]:
    """The titles of base and head, with their sessions where those are what is counted."""
    counted = comparison.design == SESSIONS
    return title(comparison.base, counted), title(comparison.head, counted)


def day(run: Run) -> str:
    """The time at which a run was measured, to the minute."""
    return run.datetime[:16].replace("T", " ")


def named(metric: Metric) -> str:
    """A metric's label, with its unit where neither the label nor the value says it."""
    return metric.label if metric.unit in ("", "bytes", "tok/s") else f"{metric.label}, {metric.unit}"


def value(benchmark: Benchmark, metric: str) -> float | None:
    """A benchmark's number: that of its median round, else the median of its rounds, else None."""
    found = benchmark.info.get(metric)
    if isinstance(found, int | float) and not isinstance(found, bool) and abs(found) <= FLOAT_MAX:
        return float(found)
    return median(benchmark.rounds[metric]) if metric in benchmark.rounds else None


def shorten(fullnames: Iterable[str], most: int | None = None) -> dict[str, str]:
    """Test ids without their file, where that leaves them distinct, and of at most `most` terminal cells.

    Of a long one the ends stay, which say what is tested and with which parameters. Where that makes two the
    same, a digest of the whole is between them, so that they stay distinct.
    """
    known = list(dict.fromkeys(fullnames))
    count = Counter(name.split("::", 1)[-1] for name in known)
    short = {name: last if count[last := name.split("::", 1)[-1]] == 1 else name for name in known}
    if most is None:
        return short
    ends = {name: middle(text, most) for name, text in short.items()}
    alike = Counter(ends.values())
    marks = {name: _digest(name) for name, text in ends.items() if alike[text] > 1}
    return {name: middle(text, most, marks.get(name, "")) for name, text in short.items()}


def brief(lines: Sequence[str], runs: Sequence[Run], name_length: int) -> list[str]:
    """The first lines, not too long, in which the long test ids of these runs are shortened."""
    names = shorten((name for run in runs for name in run.benchmarks), name_length)
    long = sorted((name for name in names if width(name) > name_length), key=len, reverse=True)
    found = []
    for line in lines[:LINES]:
        shown = line
        for name in long:
            shown = shown.replace(name, names[name])
        found.append(middle(shown, LINE_LENGTH))
    if len(lines) > LINES:
        found.append(f"and {len(lines) - LINES} more, which are all in the HTML page")
    return found


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:10]


def _rows(verdicts: list[Verdict], short: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """A row a verdict; benchmarks that could not be compared for one and the same reason share a row."""
    alike = Counter(v.reason for v in verdicts if v.metric is None)
    for verdict in verdicts:
        if verdict.metric is not None or alike[verdict.reason] == 1:
            yield _cells(verdict, short)
        elif alike[verdict.reason]:
            name, *cells = _cells(verdict, short)
            yield (f"{name} and {alike.pop(verdict.reason) - 1} more", *cells)


def _cells(verdict: Verdict, short: dict[str, str]) -> tuple[str, ...]:
    metric, name = verdict.metric, short[verdict.benchmark]
    if metric is None:
        return (name, *["-"] * (len(COLUMNS) - 2), verdict.reason)
    interval = f"{signed(verdict.low)[:-1]} to {signed(verdict.high)}" if verdict.low is not None else "-"
    allowed = "-" if verdict.tolerance is None else f"{verdict.tolerance:.1%}"
    allowed = "none" if metric.is_counter else allowed
    values = (metric.format(verdict.base), metric.format(verdict.head), signed(verdict.effect))
    return (name, named(metric), *values, interval, allowed, verdict.reason)
