"""The gate: two runs in, a verdict a metric out.

A metric FAILs if its 95 % interval lies wholly on the bad side and its effect exceeds what is allowed: the
tolerance, or the absolute floor where that is more. It PASSes if the worse end of the interval is still
allowed. Everything else is INCONCLUSIVE. A counter FAILs if it differs at all. Among many comparisons some
look bad by chance: a FAIL must also stand after Benjamini and Hochberg, so that noise fails at most one run
in forty, however many benchmarks it has. Statistics are in perf/gate/stats.py, rendering in perf/report;
nothing here measures or prints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from statistics import harmonic_mean, median

from perf.errors import GateError
from perf.gate import stats
from perf.gate.comparison import Comparison, Outcome, Verdict
from perf.gate.design import Design, UndecidedError
from perf.gate.entries import Benchmark, differences
from perf.gate.metrics import METRICS, Metric
from perf.gate.noise import Noise
from perf.gate.saved_runs import Run
from perf.gate.sessions import BetweenSessions
from perf.gate.tolerances import allowed

CANARIES = ("canary_matmul_gflops", "canary_copy_gbps")
CANARY_NOISE = 0.03
NO_NUMBER_TELLS = "too near the limit for more {} to tell"
LEVEL = (1 - stats.CONFIDENCE) / 2


def compare(
    base: Run,
    head: Run,
    *,
    design: Design | None = None,
    counters: bool = True,
    deselected: Collection[str] = (),
    others: int = 0,
) -> Comparison:
    """Judge every gated metric of every benchmark of `base` against `head`.

    Args:
        design: how they were measured; by default `BetweenSessions`, on a machine whose noise is unknown.
        counters: whether exact counters are judged too.
        deselected: benchmarks that were left out of `head` on purpose; they are named in the notes, not
            judged.
        others: comparisons of the same run that are not here, to be counted among those of which one may look
            bad by chance.
    """
    design = design or BetweenSessions()
    left_out = sorted(name for name in base.benchmarks if name not in head.benchmarks and name in deselected)
    verdicts: list[Verdict] = []
    for name, before in base.benchmarks.items():
        if name not in left_out:
            verdicts += _benchmark(before, head.benchmarks.get(name), design, counters)
    notes = [*_notes(base, head, design, counters)]
    if left_out:
        notes.append(f"deselected here and not judged: {_listed(left_out)}")
    return Comparison(base, head, tuple(_without_chance(verdicts, others)), tuple(notes), design.name)


def compare_saved(
    base: Run, head: Run, noise: Noise, *, counters: bool = True, deselected: Collection[str] = ()
) -> Comparison:
    """Judge saved runs by their sessions, on a machine of which so much is known; else as `compare`."""
    design = BetweenSessions(noise)
    found = compare(base, head, design=design, counters=counters, deselected=deselected)
    return replace(found, notes=(*found.notes, *noise.notes))


def _benchmark(
    before: Benchmark, after: Benchmark | None, design: Design, counters: bool
) -> Iterator[Verdict]:
    whole = Verdict(before.fullname, before.group, None, Outcome.ERROR, "")
    if why := _incomparable(before, after):
        yield replace(whole, reason=why)
        return
    assert after is not None
    exact = counters and before.info.get("arrivals", "all") == "all"
    for name in dict.fromkeys([*before.rounds, *before.problems, *after.problems]):
        metric = METRICS.get(name)
        if metric is not None and (exact or not metric.is_counter):
            yield _metric(replace(whole, metric=metric), metric, before, after, design)


def _incomparable(before: Benchmark, after: Benchmark | None) -> str | None:
    """Say why a benchmark as a whole cannot be compared, or None."""
    if after is None:
        return "is in the baseline and not in this run: removed, renamed, skipped or failed"
    sides = (("base", before), ("head", after))
    if broken := [f"{side} {one.problems['']}" for side, one in sides if "" in one.problems]:
        return "; ".join(broken)
    if prints := differences(before.fingerprint, after.fingerprint):
        return f"refused, the fingerprint is another: {prints}; measure the baseline again here"
    if work := differences(before.identity(), after.identity()):
        return f"refused, another thing was run: {work}; give both runs the same options"
    return None


def _metric(start: Verdict, metric: Metric, before: Benchmark, after: Benchmark, design: Design) -> Verdict:
    for side, benchmark in (("base", before), ("head", after)):
        if metric.name not in benchmark.rounds:
            problem = benchmark.problems.get(metric.name, "was not recorded")
            return replace(start, reason=f"{metric.label} {problem} in {side}")
    base, head = before.rounds[metric.name], after.rounds[metric.name]
    if metric.is_counter:
        return _exact(replace(start, rounds=(len(base), len(head))), metric, base, head)
    typical, now = (stats.typical(side.rounds_by_session(metric.name)) for side in (before, after))
    start = replace(start, base=typical, head=now, effect=now / typical - 1 if typical else None)
    start = replace(start, rounds=design.count(before, after, metric.name))
    try:
        estimate = design.estimate(before, after, metric.name)
    except UndecidedError as error:
        return replace(start, outcome=Outcome.INCONCLUSIVE, reason=str(error), rounds_needed=error.needed)
    except GateError as error:
        return replace(start, reason=str(error))
    tolerance, limit = allowed(metric, after.tolerances.get(metric.name), typical)
    start = replace(start, tolerance=tolerance)
    return _timed(
        start,
        metric,
        estimate,
        limit,
        (0.0, "") if design.side_by_side else _canary(before, after),
        design.unit,
    )


def _exact(start: Verdict, metric: Metric, base: tuple[float, ...], head: tuple[float, ...]) -> Verdict:
    if len(set(base)) > 1:
        why = f"differs between rounds of base ({_span(metric, base)}): not a counter that can be compared"
        return replace(start, reason=why, base=base[0], head=head[0])
    start = replace(start, base=base[0], head=next((value for value in head if value != base[0]), base[0]))
    if set(head) == set(base):
        return replace(
            start, outcome=Outcome.PASS, reason="the same in every round", effect=0.0, tolerance=0.0
        )
    assert start.head is not None
    word = "more" if start.head > base[0] else "fewer"
    why = f"{metric.format(abs(start.head - base[0]))} {word} than {metric.format(base[0])}"
    why += "" if len(set(head)) == 1 else f", and not the same in every round ({_span(metric, head)})"
    effect = start.head / base[0] - 1 if base[0] else None
    why += ": if meant, save a new baseline"
    return replace(start, outcome=Outcome.FAIL, reason=why, effect=effect, tolerance=0.0)


def _timed(
    start: Verdict,
    metric: Metric,
    estimate: stats.Estimate,
    limit: float,
    moved: tuple[float, str],
    unit: str,
) -> Verdict:
    """The verdict on a timing; `limit` is how large a log-ratio on the bad side may be."""
    bad = metric.bad_sign
    harm, best, worst = bad * estimate.log_ratio, *sorted((bad * estimate.low, bad * estimate.high))
    low, effect, high = (stats.change(log) for log in (estimate.low, estimate.log_ratio, estimate.high))
    known = replace(start, effect=effect, low=low, high=high, p=estimate.tail(bad))
    permitted = f"{start.tolerance:.1%} allowed"
    elsewhere = metric.unit != "bytes" and moved[0] > max(abs(estimate.log_ratio), CANARY_NOISE)
    machine = f"; but the machine changed: {moved[1]}" if elsewhere else ""
    if best > 0 and harm > limit:
        why = f"{_percent(harm, bad)}, {abs(stats.change(bad * best)):.1%} at least; {permitted}{machine}"
        return replace(known, outcome=Outcome.FAIL, reason=why)
    if worst <= limit:
        why = f"{_percent(worst, bad)} {'at least' if worst < 0 else 'at most'}; {permitted}"
        return replace(known, outcome=Outcome.PASS, reason=why, improved=worst < 0 and -harm > limit)
    balanced = harmonic_mean(start.rounds)  # so many a side would be as sure
    needed = estimate.rounds_needed(balanced, harm if harm > limit else limit - harm)
    things = unit.removesuffix(" a side")
    more = f"about {needed} {unit} would probably tell" if needed else NO_NUMBER_TELLS.format(things)
    why = f"anything from {_percent(best, bad)} to {_percent(worst, bad)}; {permitted}; {more}{machine}"
    return replace(known, outcome=Outcome.INCONCLUSIVE, reason=why, rounds_needed=needed)


def _without_chance(verdicts: list[Verdict], others: int) -> list[Verdict]:
    """The verdicts, of which those FAILs that chance could have made among so many are INCONCLUSIVE."""
    timed = [verdict for verdict in verdicts if verdict.p is not None]
    found = [verdict.p for verdict in timed if verdict.p is not None]
    standing = stats.false_discoveries([*found, *[1.0] * others], LEVEL)[: len(timed)]
    chance = {
        id(v) for v, stands in zip(timed, standing, strict=True) if v.outcome is Outcome.FAIL and not stands
    }
    count = len(timed) + others
    why = f"; alone a regression, but of {count} comparisons one may look so by chance: measure again"
    return [
        replace(v, outcome=Outcome.INCONCLUSIVE, reason=v.reason + why) if id(v) in chance else v
        for v in verdicts
    ]


def _notes(base: Run, head: Run, design: Design, counters: bool) -> Iterator[str]:
    both = [
        (before, head.benchmarks[name]) for name, before in base.benchmarks.items() if name in head.benchmarks
    ]
    yield from dict.fromkeys((*base.notes, *head.notes))
    if new := [name for name in head.benchmarks if name not in base.benchmarks]:
        yield f"new, so not judged: {_listed(new)}"
    if not counters:
        yield "counters were not judged"
    if loosened := [b.fullname for a, b in both if a.tolerances != b.tolerances]:
        yield f"tolerances are others than in the baseline: {_listed(loosened)}"
    for key in () if design.side_by_side else CANARIES:
        ratios = [1 + stats.change(c[key]) for a, b in both if key in (c := _canaries(a, b))]
        if ratios and abs(change := median(ratios) - 1) > CANARY_NOISE:
            yield f"the machine changed: {METRICS[key].label} {change:+.1%} from base to head"
    for side, run in (("base", base), ("head", head)):
        voided = [b.fullname for b in run.benchmarks.values() if b.info.get("rounds_voided")]
        if voided:
            yield f"rounds of {side} were voided by a slowdown of the hardware: {_listed(voided)}"


def _canaries(before: Benchmark, after: Benchmark) -> dict[str, float]:
    """log(head / base) of each canary that both have."""
    pairs = {key: (before.info.get(key), after.info.get(key)) for key in CANARIES}
    return {
        key: math.log(b) - math.log(a)  # the quotient may be too large for a float, or too small
        for key, (a, b) in pairs.items()
        if isinstance(a, int | float) and isinstance(b, int | float) and a > 0 and b > 0
    }


def _canary(before: Benchmark, after: Benchmark) -> tuple[float, str]:
    """Return the largest move of a canary (log units), and the words for it."""
    moves = _canaries(before, after)
    key = max(moves, key=lambda name: abs(moves[name]), default=None)
    if key is None:
        return 0.0, ""
    return abs(moves[key]), f"{METRICS[key].label} {stats.change(moves[key]):+.1%}"


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _percent(harm: float, bad: int) -> str:
    return f"{abs(stats.change(bad * harm)):.1%} {'worse' if harm > 0 else 'better'}"


def _span(metric: Metric, values: tuple[float, ...]) -> str:
    return f"{metric.format(min(values))} to {metric.format(max(values))}"
