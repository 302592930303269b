"""A bare repository with clones of it, and saved runs in their storages, for tests of `perf store`."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.perf import fake_runs
from tests.perf.bisected import state
from tests.perf.repos import commit, git

MACHINE = "Linux-CPython-3.12-64bit"
REF = "refs/heads/perf-data"
TRACKING = ("refs/remotes/origin/perf-data", "logs/refs/remotes/origin/perf-data")


def hub(folder: Path) -> Path:
    """A bare repository whose branch `main` has two commits."""
    bare, first = folder / "hub.git", folder / "first"
    git(folder, "init", "-q", "--bare", "--initial-branch=main", str(bare))
    commit(first, "c0")
    (first / "code.py").write_text("x = 1\n")
    (first / ".gitignore").write_text(".benchmarks\n")
    commit(first, "c1")
    git(first, "push", "-q", str(bare), "HEAD:main")
    return bare


def clone(bare: Path, name: str) -> Path:
    """A clone as actions/checkout makes it: one commit deep, and without credentials."""
    place = bare.parent / name
    git(bare.parent, "clone", "-q", "--depth=1", bare.as_uri(), str(place))
    return place


def save(where: Path, name: str, number: int = 1, seed: int = 0, commit_id: str = "a" * 40) -> Path:
    """A run of one benchmark in the storage of a clone; its contents depend on `seed`."""
    folder = where / ".benchmarks" / MACHINE
    folder.mkdir(parents=True, exist_ok=True)
    entry = fake_runs.entry("8", "batch_size", random.Random(seed), **fake_runs.speeds(1000.0 + seed, 8))
    about = {"id": commit_id, "dirty": False, "branch": "main"}
    return fake_runs.save(folder, name, [entry], number, commit_info=about)


def on_branch(repo: Path, ref: str = REF) -> dict[str, bytes]:
    """The contents of all files on the branch, by path; none if it is not there."""
    if not git(repo, "for-each-ref", ref):
        return {}
    paths = git(repo, "ls-tree", "-r", "-z", "--name-only", ref).split("\0")
    blobs = (subprocess.check_output(["git", "show", f"{ref}:{path}"], cwd=repo) for path in paths if path)
    return dict(zip(paths, blobs, strict=False))


def files(where: Path) -> dict[str, bytes]:
    """The contents of all files in a clone's storage, by path."""
    root = where / ".benchmarks"
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def untouched(where: Path) -> object:
    """All that a store leaves alone: every file of the checkout and of git's but objects and one ref."""
    status, names, contents = state(where)
    also = {*TRACKING, "refs/remotes/origin", "logs/refs/remotes", "logs/refs/remotes/origin"}
    code = {path.name: path.read_bytes() for path in where.iterdir() if path.is_file()}
    return status, names - also, {name: text for name, text in contents.items() if name not in also}, code
