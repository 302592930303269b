"""The report as one HTML page: no script, no network, light or dark as the reader's system is, readable on a
phone.

Layout only; the words come from `verdicts` and `text`, the pictures from `charts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from perf.gate.verdict import Comparison, Outcome
from perf.report.charts import draw, sparkline, table
from perf.report.figures import history, sections
from perf.report.markup import Markup, number, signed, tag
from perf.report.terminal import figures
from perf.report.verdicts import COLUMNS, day, headline, named, parts, shorten, title, value

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
CLASSES = {Outcome.FAIL: "bad", Outcome.ERROR: "bad", Outcome.INCONCLUSIVE: "unsure", Outcome.PASS: "good"}
PRINTS = ("gpu", "cpu", "threads", "dtype", "torch", "transformers", "triton", "cuda", "driver", "python")

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1c2430; --soft: #566273;
  --rule: #d5dae1;
  --good: #17693b; --bad: #b3202c; --unsure: #8a5a00;
  --c1: #1f5fa8; --c2: #b8500a; --c3: #17794a; --c4: #8a3fb0; --c5: #7a6a00; --c6: #b3265a; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --card: #1b2129; --ink: #e4e9f0;
  --soft: #a2aebd;
  --rule: #38424f; --good: #6fd39a; --bad: #ff8a8a; --unsure: #f0b95a;
  --c1: #7db5f2; --c2: #f2a366; --c3: #6fd39a; --c4: #d0a2f2; --c5: #dcc95c; --c6: #f28db0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem clamp(.75rem, 2.5vw, 2rem) 3rem; max-width: 86rem;
  background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; } p { margin: .25rem 0; }
  .soft, figcaption span { color: var(--soft); }
.verdict { margin: 1.25rem 0; padding: .75rem 1rem; border: 1px solid; border-left-width: .5rem;
  border-radius: .4rem; }
.verdict strong { font-size: 1.15rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.unsure { color: var(--unsure); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: .5rem; min-width: 0;
  align-self: start; }
figcaption strong { display: block; } figcaption span { font-size: .875rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; margin: .5rem 0; }
text { font: 13px system-ui, sans-serif; fill: var(--soft); } text.name { fill: var(--ink); }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; } .track { fill: var(--rule); opacity: .6; }
.was { --c: var(--ink); stroke: var(--c); stroke-width: 2; }
.s1 { --c: var(--c1); } .s2 { --c: var(--c2); --d: 7 3; } .s3 { --c: var(--c3); --d: 2 3; }
.s4 { --c: var(--c4); --d: 9 3 2 3; } .s5 { --c: var(--c5); --d: 4 4; } .s6 { --c: var(--c6); --d: 1 4; }
.before { --d: 1 3; }
g.before, .before svg { opacity: .55; }
polyline, .legend path { fill: none; stroke: var(--c); stroke-width: 2; stroke-dasharray: var(--d, none); }
circle, rect[class^=s] { fill: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .5rem 0 0; padding: 0; list-style: none;
  font-size: .875rem; }
.legend svg { display: inline-block; width: 26px; height: 10px; margin: 0 .4rem 0 0; }
.spark { width: 7.5rem; height: 1.75rem; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child, .why { text-align: left; } tbody th { font-weight: 500; } thead th { color: var(--soft); }
td.why { white-space: normal; min-width: 18rem; }
summary { cursor: pointer; font-size: .875rem; } details { margin: .5rem 0; }
@media (max-width: 40rem) {
  .stack thead { display: none; } .stack, .stack tbody, .stack tr, .stack th { display: block; }
  .stack tr { display: grid; grid-template-columns: repeat(3, auto); gap: .4rem 1rem; padding: .6rem 0;
    border-bottom: 1px solid var(--rule); }
  .stack th, .stack td { padding: 0; border: 0; text-align: left; white-space: normal; min-width: 0; }
  .stack th, .stack .why { grid-column: 1 / -1; } .stack tbody th { font-weight: 600; }
  .stack td:not(.why)::before { content: attr(data-is); display: block; font-size: .75rem;
    color: var(--soft); }
}
"""


def page(runs: Sequence[Run], comparison: Comparison | None = None, left_out: Sequence[str] = ()) -> str:
    """The page for runs oldest first: what of them could not be read, the verdict if there is one, the last
    run's charts, history, all figures."""
    head = runs[-1]
    keys = (f"c{i}" for i in count())
    body = tag(
        "body",
        tag("h1", "Performance report"),
        tag("p", f"{title(head)}, {len(head.benchmarks)} benchmarks, {day(head)}", class_="soft"),
        _left_out(left_out),
        _verdict(comparison) if comparison else None,
        tag("main", _charts(head, comparison.base if comparison else None, keys), _history(runs)),
        _figures(head),
        _runs(runs),
    )
    meta = Markup(
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    )
    start = tag("head", meta, tag("title", f"Performance of {title(head)}"), tag("style", Markup(STYLE)))
    return f"<!DOCTYPE html>\n{tag('html', start, body, lang='en')}\n"


def _left_out(lines: Sequence[str]) -> Markup | None:
    if not lines:
        return None
    heading = tag("strong", f"Left out: {len(lines)}")
    return tag("div", heading, tag("ul", [tag("li", line) for line in lines]), class_="verdict unsure")


def _verdict(comparison: Comparison) -> list[Markup]:
    pair = tag("p", f"{title(comparison.base)} → {title(comparison.head)}", class_="soft")
    out = [
        tag("div", tag("strong", headline(comparison)), pair, class_=f"verdict {CLASSES[comparison.outcome]}")
    ]
    for part in parts(comparison):
        rows = table([list(COLUMNS), *map(list, part.rows)])
        if part.folded:
            out.append(tag("details", tag("summary", f"{part.heading} ({part.count})"), rows))
        else:
            out += [tag("h3", part.heading), rows]
    return [*out, tag("ul", [tag("li", note) for note in comparison.notes])] if comparison.notes else out


def _charts(head: Run, base: Run | None, keys: Iterator[str]) -> list[Markup]:
    return [
        tag(
            "section",
            tag("h2", heading),
            tag("div", [draw(chart, next(keys)) for chart in charts], class_="charts"),
        )
        for heading, charts in sections(head, base).items()
    ]


def _history(runs: Sequence[Run]) -> Markup | None:
    series, left_out = history(runs)
    if not series:
        return None
    short = shorten(runs[-1].benchmarks)
    heading = ["benchmark", "metric", "trend", "first", "last", "change"]
    first_of: dict[str, list[str]] = {}
    others = []
    for benchmark, name, values in series:
        metric, ends = METRICS[name], [METRICS[name].format(value) for value in (values[0], values[-1])]
        line = sparkline(values, f"{metric.label} over {len(values)} runs: {ends[0]} to {ends[1]}")
        change = signed(values[-1] / values[0] - 1) if values[0] else "-"
        row = [short[benchmark.fullname], named(metric), line, *ends, change]
        if first_of.setdefault(benchmark.fullname, row) is not row:
            others.append(row)
    says = f"{len(runs)} runs, from {day(runs[0])} to {day(runs[-1])}; what gates each benchmark first."
    if left_out:
        says += f" {left_out} earlier results are left out: another fingerprint "
        says += "(machine, driver, library or model)."
    more = (
        tag("details", tag("summary", f"Other metrics ({len(others)})"), table([heading, *others]))
        if others
        else None
    )
    return tag(
        "section",
        tag("h2", "History"),
        tag("p", says, class_="soft"),
        table([heading, *first_of.values()]),
        more,
    )


def _figures(head: Run) -> Markup:
    summary = tag("summary", f"All {len(head.benchmarks)} benchmarks")
    return tag("section", tag("h2", "Figures"), tag("details", summary, table(figures(head))))


def _runs(runs: Sequence[Run]) -> Markup:
    """What was measured, where and when, newest first; where a run's benchmarks differ, each value is
    given."""
    rows = []
    for run in reversed(runs):
        some = list(run.benchmarks.values())
        prints = [
            ", ".join(dict.fromkeys(v for b in some if (v := b.fingerprint.get(key)))) or "-"
            for key in PRINTS
        ]
        voided = sum(value(b, "rounds_voided") or 0.0 for b in some)
        rows.append([title(run), day(run), *prints, number(voided)])
    return tag("section", tag("h2", "Runs"), table([["run", "measured", *PRINTS, "rounds voided"], *rows]))
