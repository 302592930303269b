"""Small git repositories for tests of `perf ab`: what their benchmarks record is written in the tree, not
measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

RECORD = """
def test_thing(benchmark):
    rounds = [{rate} * factor for factor in (0.999, 1.0, 1.001)]
    benchmark.pedantic(int, rounds=1)
    what = dict(backend="b", model="m", workload="w", group="g")
    record = dict(what, schema=1, fingerprint={{"cpu": "any"}}, rounds={{"tokens_per_s": rounds}})
    benchmark.extra_info.update(record)
"""
LOCAL = ("-c", "protocol.file.allow=always")  # git asks for it where a submodule's URL is a folder


def git(where: Path, *args: str) -> str:
    """What git says, in a folder, to somebody of no importance."""
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *who, *args], cwd=where, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def commit(folder: Path, name: str) -> str:
    """Commit all there is, with a tag; gives the commit."""
    if not (folder / ".git").exists():
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", name)
    git(folder, "tag", name)
    return git(folder, "rev-parse", "HEAD")
