"""Blocks of `perf ab`: whole pytest runs in fresh processes, base and head in ABBA order.

Neighbouring blocks make a pair, whose log-ratio is one sample: what drifts slower than two blocks cancels.
The way where two revisions cannot live side by side; else perf/ab/turns.py sees the same in far less time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from perf.ab.import_proof import Surroundings, Watch, environment
from perf.ab.serving import IN_PROCESS, Serving
from perf.gate import saved_runs, stats
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS
from perf.gate.pytest_process import PYTEST_USAGE, failure, pytest_command
from perf.gate.saved_runs import Run, load


def measure_blocks(
    names: Sequence[str],
    trees: Sequence[Path],
    args: Sequence[str],
    pairs: int,
    around: Surroundings,
    advance: Callable[[str], object],
    serving: Serving = IN_PROCESS,
) -> tuple[Run, Run]:
    """Run `pairs` blocks of each tree in turn; gives base and head, of which a round is a block's typical
    value. A block's server is started before it and stopped after it."""
    done: tuple[list[Run], list[Run]] = ([], [])
    folder = trees[0].parent
    for number, side in enumerate(order(pairs), 1):
        advance(f"block {number} of {2 * pairs}: {names[side]}")
        watch = Watch.begin(folder / f"imports-{number}", trees[side], around)
        name = f"block {number}, {names[side]}"
        log = watch.folder / "server.log"
        with serving.at(side, name, trees[side], around.top, log) as served:
            saved = block([*args, *served], folder / f"{number}.json", trees[side], name, watch)
        done[side].append(saved)
    return merge(done[0], names[0]), merge(done[1], names[1])


def order(pairs: int) -> list[int]:
    """ABBA: which side (0 or 1) each of 2 x `pairs` blocks measures."""
    return [side for pair in range(pairs) for side in ((1, 0) if pair % 2 else (0, 1))]


def block(args: Sequence[str], saved: Path, tree: Path, name: str, watch: Watch | None = None) -> Run:
    """Run pytest once in a fresh process in `tree`, and read what it saved.

    With `watch` what it imported is proven.

    Raises:
        GateError: if a test fails, nothing is collected, or nothing was saved, with the end of pytest's
            output; if something was imported from where it must not be.
    """
    command = pytest_command(args, tree, f"--benchmark-json={saved}")
    env, pipe = watch.environment() if watch else environment(tree), subprocess.PIPE
    done = subprocess.run(command, cwd=tree, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if watch and done.returncode != PYTEST_USAGE:
        watch.check(name)  # also of a block that failed: what it imported may be why
    if done.returncode or not saved.is_file() or not saved.stat().st_size:
        raise failure(name, command, done.returncode, done.stdout)
    return load(saved)


def merge(blocks: Sequence[Run], name: str) -> Run:
    """Blocks as one run: a round is a block's typical value, and of a counter every value that occurred."""
    merged = saved_runs.merge(blocks, "blocks")
    benchmarks = {fullname: _typical(one) for fullname, one in merged.benchmarks.items()}
    return replace(merged, name=name, benchmarks=benchmarks)


def _typical(benchmark: Benchmark) -> Benchmark:
    timed = [metric for metric in benchmark.rounds if not METRICS[metric].is_counter]
    values = {metric: tuple(map(stats.centre, benchmark.rounds_by_session(metric))) for metric in timed}
    return replace(benchmark, rounds={**benchmark.rounds, **values})
