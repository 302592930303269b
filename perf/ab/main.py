"""A against B on one noisy machine: two git worktrees, live processes that take turns, and a test that
decides.

Each process imports its own tree (perf/ab/import_proof.py proves it; perf/ab/worktrees.py makes the
trees). By rounds (perf/ab/experiment.py) base and head live at the same time; by blocks
(perf/ab/blocks.py) whole processes take turns, for what cannot live side by side. The checkout it is
started in stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from perf.ab import experiment
from perf.ab.blocks import measure_blocks
from perf.ab.experiment import Experiment, Plan
from perf.ab.import_proof import Surroundings, Watch
from perf.ab.in_turn import tell_disturbances, tell_too_rare
from perf.ab.revisions import commit_of, git
from perf.ab.serving import IN_PROCESS, Serving
from perf.ab.turns import Side, turns_command
from perf.ab.worktrees import worktrees
from perf.errors import Exit, GateError
from perf.gate import merging, stats
from perf.gate.comparison import Comparison, Outcome
from perf.gate.design import PairedBlocks
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS
from perf.gate.pytest_process import check_args
from perf.gate.saved_runs import Run
from perf.gate.verdict import compare

BUDGET_S = 300.0
PAIRS = 3
ROUND_S = 0.02
BLOCKS = 6
Interleave = Literal["rounds", "blocks"]


def ab(
    base: str,
    head: str,
    args: Sequence[str],
    *,
    budget: float = BUDGET_S,
    pairs: int = PAIRS,
    round_s: float = ROUND_S,
    interleave: Interleave = "rounds",
    blocks: int = BLOCKS,
    counters: bool = True,
    serving: Serving = IN_PROCESS,
    repo: Path | str = ".",
    advance: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Measure two revisions in turn and judge head against base.

    Args:
        base, head: git revisions; `.` is the working tree as it is, uncommitted and untracked files included.
        args: what pytest is given in each process, from the top of the repository.
        budget: seconds by the clock, start-up included; it ends before, once everything is decided, and after
            it only where two groups of each benchmark in each of two pairs of processes take longer.
        pairs: pairs of processes, one after the other.
        round_s: the least time of a turn, seconds.
        interleave: what takes turns: rounds of two live processes, or whole processes.
        blocks: pairs of blocks, at least four, where blocks take turns.
        counters: whether exact counters are judged too.
        serving: the servers that are measured, if any: each side's own, live as long as its process.
        advance: called with a line about what comes next, once before each pair of processes, or each block.

    Raises:
        GateError: for a revision that is not there or cannot be made whole, options that measure nothing, a
            process that fails, or one that imported anything from elsewhere than its own tree and real
            installed files.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after processes and worktrees are gone.
    """
    _check_numbers(budget, pairs, round_s, interleave, blocks)
    check_args(args, "process")
    top = Path(git(Path(repo), "rev-parse", "--show-toplevel"))
    commits = [commit_of(top, revision) for revision in (base, head)]
    with worktrees(top, commits) as trees:
        around = Surroundings.of(top, trees)
        if interleave == "blocks":
            runs = measure_blocks((base, head), trees, args, blocks, around, advance, serving)
            comparison = compare(*runs, design=PairedBlocks(), counters=counters)
        else:
            one = Experiment(Plan(budget, pairs, round_s))
            sides = _in_trees((base, head), trees, args, around, serving)
            saved = list(experiment.run(sides, [one], advance))
            runs = _joined(base, [pair[0] for pair in saved]), _joined(head, [pair[1] for pair in saved])
            comparison = concluded(one, *runs, counters)
    if commits[0] == commits[1]:
        note = f"both revisions are commit {commits[0][:12]}: whatever differs is the machine"
        comparison = replace(comparison, notes=(*comparison.notes, note))
    return comparison


def concluded(one: Experiment, base: Run, head: Run, counters: bool = True) -> Comparison:
    """The comparison at an experiment's end, with what a reader should know of its course."""
    runs = (_as_judged(one, run, side) for side, run in enumerate((base, head)))
    comparison = compare(*runs, design=one.design, counters=counters)
    notes = [*comparison.notes]
    if one.replayed:
        what = "they time themselves and take no turns; --interleave blocks measures them"
        notes.append(f"not judged: {', '.join(sorted(one.replayed))}: {what}")
    timed = {v.benchmark: one.design.series[v.benchmark] for v in comparison.verdicts if v.p is not None}
    notes += tell_disturbances({name: series.disturbances for name, series in timed.items()})
    notes += [line for name, series in timed.items() for line in tell_too_rare(name, series)]
    turns_s, shares = sum(one.measured_s.values()), f"{one.pairs} of {one.plan.pairs} pairs of processes"
    took = f"it took {one.seconds:.0f} s, {turns_s:.0f} s of them in turns, and {shares}"
    if open_ := [v for v in comparison.verdicts if v.outcome is Outcome.INCONCLUSIVE and v.rounds_needed]:
        factor = max(v.rounds_needed / max(1, min(v.rounds)) for v in open_ if v.rounds_needed)
        enough = _minutes(factor * one.plan.budget_s)
        notes.append(f"{took}; --budget {enough} would probably decide the rest")
    elif any(v.outcome is Outcome.INCONCLUSIVE for v in comparison.verdicts):
        notes.append(f"{took}; what is undecided needs more --pairs, a longer --budget, or a wider tolerance")
    else:
        notes.append(took)
    return replace(comparison, notes=tuple(notes))


def _as_judged(one: Experiment, run: Run, side: int) -> Run:
    """A run with those rounds of its timings that were judged at the last look."""
    benchmarks = {}
    for name, benchmark in run.benchmarks.items():
        if name in one.replayed:
            continue
        series = one.design.series[name]
        told = series.rounds(side)
        timed = {key: values for key, values in told.items() if not METRICS[key].is_counter}
        judged = {
            key: timed.get(key, values)
            for key, values in benchmark.rounds.items()
            if key not in series.too_rare
        }
        benchmarks[name] = replace(benchmark, rounds=judged, sessions=())
    return replace(run, benchmarks=benchmarks)


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))}m"


def _check_numbers(budget: float, pairs: int, round_s: float, interleave: str, blocks: int) -> None:
    """Raise GateError, code 2, for what cannot decide anything."""
    if interleave == "blocks" and blocks < stats.MIN_PAIRS:
        raise GateError(f"blocks={blocks} cannot decide anything: give {stats.MIN_PAIRS} or more", Exit.USAGE)
    if interleave not in ("rounds", "blocks"):
        raise GateError(f"interleave={interleave!r} must be rounds or blocks", Exit.USAGE)
    for name, value in (("budget", budget), ("min-round", round_s)):
        if not 0 < value < float("inf"):
            raise GateError(f"{name}={value} must be seconds above 0", Exit.USAGE)
    if pairs < 1:
        raise GateError(f"pairs={pairs} must be 1 or more", Exit.USAGE)


def _in_trees(
    names: Sequence[str], trees: Sequence[Path], args: Sequence[str], around: Surroundings, serving: Serving
) -> experiment.Sides:
    """Processes that each measure their own tree, which is proven at their end."""

    @contextmanager
    def sides(number: int) -> Iterator[Sequence[Side]]:
        found, watches = [], []
        with ExitStack() as servers:
            for side, tree in enumerate(trees):
                watch = Watch.begin(trees[0].parent / f"imports-{number}-{side}", tree, around)
                name = f"{names[side]}, process {number + 1}"
                log = watch.folder / "server.log"
                served = servers.enter_context(serving.at(side, name, tree, around.top, log))
                command = turns_command([*args, *served], tree, watch.folder)
                found.append(Side(name, command, tree, watch.environment(), watch.folder, bool(served)))
                watches.append(watch)
            try:
                yield found
            except GateError as error:
                if error.code is not Exit.USAGE:
                    _prove(found, watches)  # what was imported may be why
                raise
        _prove(found, watches)

    return sides


def _prove(sides: Sequence[Side], watches: Sequence[Watch]) -> None:
    for side, watch in zip(sides, watches, strict=True):
        watch.check(side.name)


def _joined(name: str, saved: Sequence[Run | None]) -> Run:
    """What the processes of a side saved, as one run.

    Raises:
        GateError: if none of them measured anything.
    """
    runs = [run for run in saved if run is not None]
    if not runs:
        raise GateError(f"{name}: pytest measured nothing")
    found: dict[str, list[Benchmark]] = {}
    for one in runs:
        for fullname, benchmark in one.benchmarks.items():
            found.setdefault(fullname, []).append(benchmark)  # in the processes that had not decided it yet
    benchmarks = {fullname: merging.merge(some, "processes") for fullname, some in found.items()}
    return replace(runs[-1], name=name, benchmarks=benchmarks)
