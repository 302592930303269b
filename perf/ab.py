"""A against B on one noisy machine: two git worktrees, fresh processes in ABBA order, a verdict by pairs of blocks.

A block is one pytest run in a process of its own, that imports its own tree. Neighbouring blocks make a pair, whose
log-ratio is one sample: what drifts slower than two blocks cancels. The checkout it is started in stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from perf import gate, stats
from perf.metrics import METRICS
from perf.runs import Benchmark, Exit, GateError, Run, load

OWN_OPTIONS = ("--benchmark-json", "--benchmark-save", "--benchmark-autosave", "--perf-baseline", "--perf-plant")
NO_TIMINGS = ("--benchmark-disable", "--benchmark-skip", "--numprocesses", "--dist", "-n")
TAIL = 30
Advance = Callable[[str], object]


def ab(
    base: str,
    head: str,
    args: Sequence[str],
    *,
    blocks: int = 6,
    counters: bool = True,
    repo: Path | str = ".",
    advance: Advance = lambda _: None,
) -> gate.Comparison:
    """Measure two revisions in turn and judge head against base.

    Args:
        base, head: git revisions; `.` is the working tree as it is, uncommitted and untracked files included.
        args: what pytest is given in each block, from the top of the repository.
        blocks: pairs of blocks, at least four.
        counters: whether exact counters are judged too.
        advance: called with a line about what comes next, once before each block.

    Raises:
        GateError: for a revision that is not there, options that measure nothing, or a block that fails.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the worktrees are gone.
    """
    check(args, blocks)
    top = Path(_git(Path(repo), "rev-parse", "--show-toplevel"))
    commits = [_commit(top, revision) for revision in (base, head)]
    done: tuple[list[Run], list[Run]] = ([], [])
    with worktrees(top, commits) as trees:
        for tree in trees:
            check_imports(tree)
        for number, side in enumerate(order(blocks), 1):
            advance(f"block {number} of {2 * blocks}: {(base, head)[side]}")
            saved = trees[side].parent / f"{number}.json"
            done[side].append(block(args, saved, trees[side], f"block {number}, {(base, head)[side]}"))
    comparison = gate.compare(merge(done[0], base), merge(done[1], head), paired=True, counters=counters)
    if commits[0] == commits[1]:
        note = f"both revisions are commit {commits[0][:12]}: whatever differs is the machine"
        comparison = replace(comparison, notes=(*comparison.notes, note))
    return comparison


def order(pairs: int) -> list[int]:
    """ABBA: which side (0 or 1) each of 2 x `pairs` blocks measures."""
    return [side for pair in range(pairs) for side in ((1, 0) if pair % 2 else (0, 1))]


def check(args: Sequence[str], blocks: int) -> None:
    """Raises GateError, code 2, for arguments of pytest that take the measuring away from us, or too few pairs."""
    if blocks < stats.MIN_PAIRS:
        raise GateError(f"blocks={blocks} cannot decide anything: give {stats.MIN_PAIRS} or more", Exit.USAGE)
    for arg in args:
        option = arg.split("=")[0]
        if option in OWN_OPTIONS:
            raise GateError(f"{option} is set for each block by itself: leave it out", Exit.USAGE)
        if option in NO_TIMINGS or (arg.startswith("-n") and arg[2:].isdigit()):
            raise GateError(f"{arg} turns benchmarks off, so that nothing is timed: leave it out", Exit.USAGE)


@contextmanager
def worktrees(top: Path, commits: Sequence[str]) -> Iterator[list[Path]]:
    """A detached worktree for each commit, in a temporary folder; removed whatever happens, SIGTERM included."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    folder = Path(tempfile.mkdtemp(prefix="perf-ab-"))
    trees = [folder / side for side in ("base", "head")]
    try:
        for tree, commit in zip(trees, commits, strict=True):
            _git(top, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(tree), commit)
        yield trees
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them
        for tree in trees:
            if tree.exists():
                _git(top, "worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, before)


def check_imports(tree: Path) -> None:
    """Raises GateError if a process in `tree` would import one of its packages from elsewhere (an installed copy)."""
    roots = [root for root in (tree, tree / "src") if root.is_dir()]
    packages = sorted(path.parent.name for root in roots for path in root.glob("*/__init__.py"))
    code = "import sys, importlib.util as u\nfor n in sys.argv[1:]: print(n, u.find_spec(n).origin)"
    found = subprocess.run(
        [sys.executable, "-c", code, *packages], cwd=tree, env=environment(tree), capture_output=True, text=True
    )
    for line in found.stdout.splitlines():
        name, origin = line.split(" ", 1)
        if tree.resolve() not in Path(origin).resolve().parents:
            raise GateError(f"{name} would be imported from {origin}, not from the revision's own tree: uninstall it")
    if found.returncode:
        raise GateError(f"the packages of {tree.name} cannot be found by Python: {found.stderr.strip()[-500:]}")


def environment(tree: Path) -> dict[str, str]:
    """This process's environment, with imports from `tree` (or its src folder) first."""
    paths = [str(tree), str(tree / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def block(args: Sequence[str], saved: Path, tree: Path, name: str) -> Run:
    """Run pytest once in a fresh process in `tree`, and read what it saved.

    Raises:
        GateError: if a test fails, nothing is collected, or nothing was saved, with the end of pytest's output.
    """
    command = [sys.executable, "-m", "pytest", *args, "-q", "-p", "no:cacheprovider", f"--benchmark-json={saved}"]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode or not saved.is_file() or not saved.stat().st_size:
        what = f"pytest ended with code {done.returncode}" if done.returncode else "pytest measured nothing"
        tail = "\n".join(done.stdout.splitlines()[-TAIL:])
        code = Exit.USAGE if done.returncode == 4 else Exit.NOT_COMPARABLE
        raise GateError(f"{name}: {what} ({' '.join(command[2:])})\n{tail}", code)
    return load(saved)


def merge(blocks: Sequence[Run], name: str) -> Run:
    """Blocks as one run, each of whose rounds is a block's typical value; of counters every value that occurred."""
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


def _commit(top: Path, revision: str) -> str:
    """The commit that a revision names; for `.` one made of the working tree, that no branch or index knows of."""
    if revision != ".":
        _check_one_meaning(top, revision)
        try:
            return _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        except GateError:
            raise GateError(
                f"no revision {revision!r} in {top}: give a branch, tag or commit (fetched), or '.'", Exit.USAGE
            ) from None
    with tempfile.TemporaryDirectory(prefix="perf-ab-") as folder:
        index = Path(folder) / "index"
        own = top / _git(top, "rev-parse", "--git-path", "index")
        if own.is_file():
            shutil.copyfile(own, index)  # so that git need not read every file again
        who = {f"GIT_{role}_{part}": "perf-ab" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
        extra = {"GIT_INDEX_FILE": str(index), **who}
        _git(top, "add", "--all", extra=extra)
        tree = _git(top, "write-tree", extra=extra)
        return _git(top, "commit-tree", tree, "-p", "HEAD", "-m", "the working tree as it was", extra=extra)


def _check_one_meaning(top: Path, revision: str) -> None:
    """Raises GateError, code 2, if a revision's name is that of several refs: git would take one in
    silence."""
    name = re.split(r"[~^:]|@\{", revision, maxsplit=1)[0]
    rules = ("refs/{}", "refs/tags/{}", "refs/heads/{}", "refs/remotes/{}", "refs/remotes/{}/HEAD")
    wanted = [rule.format(name) for rule in rules]
    commit = "%(if)%(*objectname)%(then)%(*objectname)%(else)%(objectname)%(end)"  # of a tag, what it is of
    lines = _git(top, "for-each-ref", f"--format={commit} %(refname)", *wanted).splitlines()
    found = {ref: commit for commit, ref in (line.split(" ", 1) for line in lines) if ref in wanted}
    if len(set(found.values())) > 1:
        raise GateError(f"revision {revision!r} is ambiguous: give one of {', '.join(found)}", Exit.USAGE)


def _git(where: Path, *args: str, extra: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *args], capture_output=True, text=True, env={**os.environ, **(extra or {})}
        )
    except FileNotFoundError:
        raise GateError("git is not installed: perf ab needs it", Exit.USAGE) from None
    if done.returncode:
        raise GateError(f"git {' '.join(args)} failed: {done.stderr.strip() or done.returncode}", Exit.USAGE)
    return done.stdout.strip()
