"""Test of the gate itself: identical code and injected slowdowns, judged as `perf ab` judges two revisions.

A trial is one A/B run: pairs of fresh processes in ABBA order, all of them its own. The processes of a trial
start together, since nearly all of their time is imports, and then measure one at a time while the others
sleep. Each process of B measures every effect in turn, so that figures for different effects share processes;
trials of one effect share nothing. The slowdown is injected from outside: nothing in the engine knows of it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.errors import Exit, GateError
from perf.gate import ab, stats
from perf.gate.comparison import Comparison, Outcome
from perf.gate.design import PairedBlocks
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare

PAIRS = 4
BLOCK = (sys.executable, "-m", "perf.measure.selftest_block")  # see there for what it is asked
PIPE = subprocess.PIPE
Measure = Callable[[int, float], Run]  # (which process, injected slowdown) -> what it measured


@dataclass(frozen=True, slots=True)
class Rate:
    """Verdicts on every trial of one effect.

    outcomes: of whole runs, one a trial. failed: by metric, how many trials called that one a regression.
    """

    effect: float
    outcomes: tuple[Outcome, ...]
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def regressions(self) -> int:
        return sum(outcome is Outcome.FAIL for outcome in self.outcomes)

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % interval (Clopper and Pearson) of the true rate of regressions called."""
        return stats.binomial_bounds(self.regressions, len(self.outcomes))


@dataclass(frozen=True, slots=True)
class Report:
    """Rates, one an effect; visible: by metric, the slowdown called a regression four times in five."""

    pairs: int
    rates: tuple[Rate, ...]
    visible: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain Python, for JSON."""
        rates = [
            {
                "effect": rate.effect,
                "trials": len(rate.outcomes),
                "regressions": rate.regressions,
                "bounds": list(rate.bounds),
                "outcomes": [str(outcome) for outcome in rate.outcomes],
                "failed": rate.failed,
            }
            for rate in self.rates
        ]
        return {"pairs": self.pairs, "rates": rates, "visible": self.visible}


def selftest(
    effects: Sequence[float] = (0.0, 0.03, 0.05, 0.10),
    trials: int = 20,
    *,
    pairs: int = PAIRS,
    args: Sequence[str] = (),
    advance: Callable[[str], object] = lambda _: None,
) -> Report:
    """Run `trials` A/B runs of every injected effect and count what the gate calls them.

    Args:
        effects: injected slowdowns as fractions; 0 is identical code, and gives the false-alarm rate.
        pairs: pairs of blocks a trial.
        args: pytest arguments of a benchmark of your own, each block then being a pytest run
            (`--perf-inject-slowdown` plants in it); by default a tiny model on the CPU, without pytest's
            overhead.
        advance: called with a line about what comes next, once before each trial.

    Raises:
        GateError: for effects, trials or pairs that make no sense, or a block that fails.
    """
    if trials < 1:
        raise GateError(f"trials={trials} must be 1 or more", Exit.USAGE)
    if not effects or any(not 0 <= effect < 10 for effect in effects) or len(set(effects)) < len(effects):
        raise GateError(
            f"effects={list(effects)} must be different fractions from 0 (0.1 is 10 %)", Exit.USAGE
        )
    ab.check(args, pairs)
    found: dict[float, list[Comparison]] = {effect: [] for effect in effects}
    for trial in range(trials):
        advance(f"trial {trial + 1} of {trials}")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-selftest-")))
            blocks = _pytest_runs(args, folder) if args else _processes(2 * pairs, folder)
            measure = stack.enter_context(blocks)
            base, heads = one_trial(measure, effects, pairs, trial)
        for effect in effects:
            head = ab.merge(heads[effect], f"{effect:.0%} slower")
            found[effect].append(compare(ab.merge(base, "as it is"), head, design=PairedBlocks()))
    return Report(pairs, tuple(_rate(effect, some) for effect, some in found.items()), _visible(found))


def one_trial(
    measure: Measure, effects: Sequence[float], pairs: int, trial: int
) -> tuple[list[Run], dict[float, list[Run]]]:
    """Measure A blocks without a slowdown and B blocks with each, in ABBA order.

    Which effect a B block begins with changes from block to block.
    """
    base: list[Run] = []
    heads: dict[float, list[Run]] = {effect: [] for effect in effects}
    for number, side in enumerate(ab.order(pairs)):
        if side == 0:
            base.append(measure(number, 0.0))
            continue
        turn = (trial + number // 2) % len(effects)
        for effect in [*effects[turn:], *effects[:turn]]:
            heads[effect].append(measure(number, effect))
    return base, heads


def _rate(effect: float, comparisons: Sequence[Comparison]) -> Rate:
    failed: dict[str, int] = {}
    for comparison in comparisons:
        timed = {v.metric.name: v.outcome for v in comparison.verdicts if v.metric and v.p is not None}
        for name, outcome in timed.items():
            failed[name] = failed.get(name, 0) + (outcome is Outcome.FAIL)
    return Rate(effect, tuple(comparison.outcome for comparison in comparisons), failed)


def _visible(found: dict[float, list[Comparison]]) -> dict[str, float]:
    """Return by metric the smallest effect that would be seen, from the intervals themselves.

    Half an interval and 0.84 standard errors must fit between no effect and this one.
    """
    sizes: dict[str, list[float]] = {}
    for comparison in (c for some in found.values() for c in some):
        for v in comparison.verdicts:
            if v.metric is None or v.low is None or v.high is None or v.tolerance is None:
                continue
            half = (math.log1p(v.high) - math.log1p(v.low)) / 2
            error = half / stats.t_quantile((1 + stats.CONFIDENCE) / 2, v.rounds[0] - 1)
            sure = max(half, v.metric.log_limit(v.tolerance)) + stats.POWER_Z * error
            sizes.setdefault(v.metric.name, []).append(math.expm1(sure))
    return {name: statistics.median(values) for name, values in sizes.items()}


@contextmanager
def _pytest_runs(args: Sequence[str], folder: Path) -> Iterator[Measure]:
    """Runs of pytest, each in a process of its own; what they save lies in a folder."""
    numbers = itertools.count()

    def measure(process: int, effect: float) -> Run:
        slowed = [*args, f"--perf-inject-slowdown={effect}"]
        name = f"block {process}, {effect:.0%} slower"
        return ab.block(slowed, folder / f"{next(numbers)}.json", Path.cwd(), name)

    yield measure


class _Block:
    """A process that measures when it is asked to; whatever it prints goes to a log."""

    def __init__(self, log: Path) -> None:
        paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(BLOCK, stdin=PIPE, stdout=PIPE, stderr=errors, env=env, text=True)

    def ask(self, **request: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        self.wait()

    def wait(self) -> None:
        """Wait until it is ready; raise GateError, with the end of its log, if it ended instead."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            code = self.process.wait()
            raise GateError(f"a block ended with code {code}:\n{self.log.read_text()[-2000:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def _processes(count: int, folder: Path) -> Iterator[Measure]:
    """Fresh processes that have loaded everything and wait; each measures when asked, alone."""
    numbers = itertools.count()
    with ExitStack() as stack:
        blocks: list[_Block] = []
        for number in range(count):
            blocks.append(_Block(folder / f"{number}.log"))
            stack.callback(blocks[-1].end)
        for block in blocks:
            block.wait()

        def measure(process: int, effect: float) -> Run:
            path = folder / f"{next(numbers)}.json"
            blocks[process].ask(effect=effect, path=str(path))
            return load(path)

        yield measure
