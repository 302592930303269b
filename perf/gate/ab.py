"""A against B on one noisy machine: two git worktrees, fresh processes in ABBA order, a verdict by pairs.

A block is one pytest run in a process of its own, that imports its own tree (perf/gate/import_proof.py proves
it; perf/gate/worktrees.py makes the trees). Neighbouring blocks make a pair, whose log-ratio is one sample:
what drifts slower than two blocks cancels. The checkout it is started in stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from statistics import median
from typing import Any

from perf.errors import Exit, GateError
from perf.gate import stats
from perf.gate.comparison import Comparison
from perf.gate.design import PairedBlocks
from perf.gate.entries import Benchmark
from perf.gate.import_proof import Surroundings, Watch, environment
from perf.gate.metrics import METRICS
from perf.gate.revisions import commit_of, git
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare
from perf.gate.worktrees import worktrees

OWN_OPTIONS = {"--benchmark-json", "--benchmark-save", "--benchmark-autosave"}
OWN_OPTIONS |= {"--perf-baseline", "--perf-inject-slowdown"}
NO_TIMINGS = ("--benchmark-disable", "--benchmark-skip", "--numprocesses", "--dist", "-n")
TAIL = 30
PYTEST_USAGE = 4


def ab(
    base: str,
    head: str,
    args: Sequence[str],
    *,
    blocks: int = 6,
    counters: bool = True,
    repo: Path | str = ".",
    advance: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Measure two revisions in turn and judge head against base.

    Args:
        base, head: git revisions; `.` is the working tree as it is, uncommitted and untracked files included.
        args: what pytest is given in each block, from the top of the repository.
        blocks: pairs of blocks, at least four.
        counters: whether exact counters are judged too.
        advance: called with a line about what comes next, once before each block.

    Raises:
        GateError: for a revision that is not there or cannot be made whole, options that measure nothing, a
            block that fails, or one that imported anything from elsewhere than its own tree and real
            installed files.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the worktrees are gone.
    """
    check(args, blocks)
    top = Path(git(Path(repo), "rev-parse", "--show-toplevel"))
    commits = [commit_of(top, revision) for revision in (base, head)]
    done: tuple[list[Run], list[Run]] = ([], [])
    with worktrees(top, commits) as trees:
        folder, around = trees[0].parent, Surroundings.of(top, trees)
        for number, side in enumerate(order(blocks), 1):
            advance(f"block {number} of {2 * blocks}: {(base, head)[side]}")
            watch = Watch.begin(folder / f"imports-{number}", trees[side], around)
            name = f"block {number}, {(base, head)[side]}"
            done[side].append(block(args, folder / f"{number}.json", trees[side], name, watch))
    comparison = compare(merge(done[0], base), merge(done[1], head), design=PairedBlocks(), counters=counters)
    if commits[0] == commits[1]:
        note = f"both revisions are commit {commits[0][:12]}: whatever differs is the machine"
        comparison = replace(comparison, notes=(*comparison.notes, note))
    return comparison


def order(pairs: int) -> list[int]:
    """ABBA: which side (0 or 1) each of 2 x `pairs` blocks measures."""
    return [side for pair in range(pairs) for side in ((1, 0) if pair % 2 else (0, 1))]


def check(args: Sequence[str], blocks: int) -> None:
    """Raise GateError, code 2, for pytest arguments that take away the measuring, or too few pairs."""
    if blocks < stats.MIN_PAIRS:
        raise GateError(f"blocks={blocks} cannot decide anything: give {stats.MIN_PAIRS} or more", Exit.USAGE)
    for arg in args:
        option = arg.split("=")[0]
        if option in OWN_OPTIONS:
            raise GateError(f"{option} is set for each block by itself: leave it out", Exit.USAGE)
        if option in NO_TIMINGS or (arg.startswith("-n") and arg[2:].isdigit()):
            raise GateError(f"{arg} turns benchmarks off, so that nothing is timed: leave it out", Exit.USAGE)


def block(args: Sequence[str], saved: Path, tree: Path, name: str, watch: Watch | None = None) -> Run:
    """Run pytest once in a fresh process in `tree`, and read what it saved.

    With `watch` what it imported is proven.

    Raises:
        GateError: if a test fails, nothing is collected, or nothing was saved, with the end of pytest's
            output; if something was imported from where it must not be.
    """
    command = [sys.executable, "-m", "pytest", *args, "-q", "-p", "no:cacheprovider"]
    command.append(f"--benchmark-json={saved}")
    unwanted = any(arg.endswith("no:perf.plugin") for arg in args)
    if not unwanted and (not (tree / "perf").is_dir() or (tree / "perf" / "plugin.py").is_file()):
        command += ["-p", "perf.plugin"]  # or nobody would look at a tolerance mark
    if _has_xdist(args):
        command.append("-n0")  # outranks the project's own addopts, and those in PYTEST_ADDOPTS
    env, pipe = watch.environment() if watch else environment(tree), subprocess.PIPE
    done = subprocess.run(command, cwd=tree, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    if watch and done.returncode != PYTEST_USAGE:
        watch.check(name)  # also of a block that failed: what it imported may be why
    if done.returncode or not saved.is_file() or not saved.stat().st_size:
        what = f"pytest ended with code {done.returncode}" if done.returncode else "pytest measured nothing"
        tail = "\n".join(done.stdout.splitlines()[-TAIL:])
        code = Exit.USAGE if done.returncode == PYTEST_USAGE else Exit.NOT_COMPARABLE
        raise GateError(f"{name}: {what} ({' '.join(command[2:])})\n{tail}", code)
    return load(saved)


def _has_xdist(args: Sequence[str]) -> bool:
    """Return whether a block's pytest loads xdist by itself, under which pytest-benchmark times nothing."""
    given = [*args, *os.environ.get("PYTEST_ADDOPTS", "").split()]
    refused = any(arg.endswith("no:xdist") or arg == "--disable-plugin-autoload" for arg in given)
    if refused or os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        return False
    return bool(entry_points(group="pytest11", name="xdist"))


def merge(blocks: Sequence[Run], name: str) -> Run:
    """Blocks as one run: a round is a block's typical value, and of a counter every value that occurred."""
    names = dict.fromkeys(fullname for run in blocks for fullname in run.benchmarks)
    merged = {fullname: _merge([run.benchmarks.get(fullname) for run in blocks]) for fullname in names}
    return replace(blocks[0], name=name, benchmarks=merged)


def _merge(found: Sequence[Benchmark | None]) -> Benchmark:
    entries = [entry for entry in found if entry is not None]
    first, problems = entries[0], {key: why for entry in entries for key, why in entry.problems.items()}
    if len(entries) < len(found):
        problems[""] = f"was measured in {len(entries)} of {len(found)} blocks only"
    elif any(entry.fingerprint != first.fingerprint for entry in entries):
        problems[""] = "has another fingerprint from block to block"
    rounds: dict[str, tuple[float, ...]] = {}
    for metric in dict.fromkeys(name for entry in entries for name in entry.rounds):
        samples = [entry.rounds[metric] for entry in entries if metric in entry.rounds]
        if len(samples) < len(entries):
            problems[metric] = f"was recorded in {len(samples)} of {len(entries)} blocks only"
        elif METRICS[metric].direction == "exact":
            rounds[metric] = tuple(value for sample in samples for value in sample)
        else:
            rounds[metric] = tuple(stats.centre(sample) for sample in samples)
    info: dict[str, Any] = dict(first.info)
    for key in (key for key in info if key in METRICS):
        values = [value for entry in entries if isinstance(value := entry.info.get(key), int | float)]
        info[key] = median(values) if len(values) == len(entries) else None
    return replace(first, info=info, rounds=rounds, problems=problems)
