"""Git revisions for `perf ab`: a name becomes a commit, and so does a working tree as it is.

The checkout itself stays as it is: its index, and those of its submodules, are read and never written.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from perf.errors import Exit, GateError

NOT_SPARSE = ("-c", "core.sparseCheckout=false")  # what lies outside its patterns counts too
# What git tells its hooks about where they are: here it would lead from one repository into another.
PLACES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX"}
PLACES |= {"GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"}


def ask_git(
    where: Path, *args: str, extra: Mapping[str, str] | None = None, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder; return how it ended and what it said, whatever that is.

    Args:
        extra: environment variables beside those of this process.
        given: what git reads on its standard input.

    Raises:
        GateError: code 2, if git is not installed.
    """
    environment = {key: value for key, value in os.environ.items() if key not in PLACES}
    try:
        return subprocess.run(
            ["git", "-C", str(where), *args],
            input=given,
            capture_output=True,
            env={**environment, "GIT_TERMINAL_PROMPT": "0", **(extra or {})},
        )
    except FileNotFoundError:
        raise GateError("git is not installed: perf needs it", Exit.USAGE) from None


def git(where: Path, *args: str, extra: Mapping[str, str] | None = None, given: bytes = b"") -> str:
    """Run git as `ask_git` does; return its output without the last line's end.

    Raises:
        GateError: code 2, with what git said, if it fails or is not installed.
    """
    done = ask_git(where, *args, extra=extra, given=given)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip() or done.returncode
        raise GateError(f"git {' '.join(args)} failed: {why}", Exit.USAGE)
    return done.stdout.decode(errors="surrogateescape").strip()


def commit_of(top: Path, revision: str) -> str:
    """The commit that a revision names; of `.` one made of the working tree, that no branch or index knows.

    Raises:
        GateError: code 2, for a name of nothing, or of several refs.
    """
    if revision == ".":
        return snapshot(top)
    _check_one_meaning(top, revision)
    try:
        return git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except GateError:
        raise GateError(
            f"no revision {revision!r} in {top}: give a branch, tag or commit (fetched), or '.'", Exit.USAGE
        ) from None


def _check_one_meaning(top: Path, revision: str) -> None:
    """Raise GateError if a revision's name is that of several refs: git would take one in silence."""
    name = re.split(r"[~^:]|@\{", revision, maxsplit=1)[0]
    rules = ("refs/{}", "refs/tags/{}", "refs/heads/{}", "refs/remotes/{}", "refs/remotes/{}/HEAD")
    wanted = [rule.format(name) for rule in rules]
    commit = "%(if)%(*objectname)%(then)%(*objectname)%(else)%(objectname)%(end)"  # of a tag, what it is of
    lines = git(top, "for-each-ref", f"--format={commit} %(refname)", *wanted).splitlines()
    found = {ref: commit for commit, ref in (line.split(" ", 1) for line in lines) if ref in wanted}
    if len(set(found.values())) > 1:
        raise GateError(f"revision {revision!r} is ambiguous: give one of {', '.join(found)}", Exit.USAGE)


def snapshot(top: Path) -> str:
    """A commit of a working tree and its submodules as they are, that no branch or index knows of."""
    with tempfile.TemporaryDirectory(prefix="perf-ab-") as folder:
        index = Path(folder) / "index"
        own = top / git(top, "rev-parse", "--git-path", "index")
        if own.is_file():
            shutil.copy2(own, index)  # with its time, by which git knows the files that it must read again
        who = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")
        extra = {"GIT_INDEX_FILE": str(index), **{f"GIT_{part}": "perf-ab" for part in who}}
        _look_at_all(top, extra)
        git(top, *NOT_SPARSE, "add", "--all", extra=extra)
        for path, _ in gitlinks(top, extra):
            if (top / path / ".git").exists():
                git(top, "update-index", "--cacheinfo", f"160000,{snapshot(top / path)},{path}", extra=extra)
        tree = git(top, "write-tree", extra=extra)
        return git(top, "commit-tree", tree, "-p", "HEAD", "-m", "the working tree as it was", extra=extra)


def _look_at_all(top: Path, extra: dict[str, str]) -> None:
    """Have an index tell git to look at every file again that it was told not to.

    A file that is not there because the checkout is sparse stays as the index has it.
    """
    marked = git(top, *NOT_SPARSE, "ls-files", "-v", "-z", extra=extra).split("\0")
    files = [(entry[0], entry[2:]) for entry in marked if entry]
    assumed = [path for tag, path in files if tag.islower()]
    skipped = [path for tag, path in files if tag in "Ss" and os.path.lexists(top / path)]
    for option, paths in (("--no-assume-unchanged", assumed), ("--no-skip-worktree", skipped)):
        for start in range(0, len(paths), 500):  # a command line has room for so many
            git(top, *NOT_SPARSE, "update-index", option, "--", *paths[start : start + 500], extra=extra)


def gitlinks(repo: Path, extra: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """The path and the commit of each submodule in a repository's index."""
    listed = git(repo, "ls-files", "--stage", "-z", extra=extra).split("\0")
    entries = [line.partition("\t") for line in listed]
    return [(path, about.split()[1]) for about, _, path in entries if about.startswith("160000 ")]
