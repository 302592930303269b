"""The branch of saved runs, by git's plumbing: read it, make a commit on it, put that there unless it moved.

New objects come into the repository, and the branch or the remote's tracking ref moves; nothing else does.
Until the last step what is made can be seen by nobody, so that whatever is killed leaves no trace. No hook of
the user's runs. It needs git 2.29.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.ab.revisions import ask_git, git
from perf.errors import Exit, GateError

BRANCH = "perf-data"
ORIGIN, HERE = "origin", "."
ATTEMPTS = 50  # of which each fails only because another writer's did not
MOST_WAIT_S = 2.0
ENGLISH = {"LC_ALL": "C", "LANGUAGE": "C"}  # git's words are read below
# No hook, and no setting by which git would write more than it is asked for.
QUIET = ("core.hooksPath=/dev/null", "core.splitIndex=false", "core.fsmonitor=false", "index.sparse=false")
PLAIN = tuple(part for setting in QUIET for part in ("-c", setting))
BUSY = (
    "cannot lock ref",
    ".lock'",
    "failed to update ref",
    "incorrect old value",
    "reference already exists",
)
AT_ONCE = 32  # blobs that are held in memory
FILE_MODES = ("100644", "100755")


class LostRaceError(Exception):
    """Another writer was faster; the message is git's own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file on the branch."""

    path: str
    oid: str
    size: int  # bytes


class Branch:
    """A branch in this repository, or at a remote of it. `where` is any folder in the repository."""

    def __init__(self, where: Path, remote: str | None, name: str) -> None:
        self.where, self.remote, self.name = where, remote, name
        self.ref = f"refs/heads/{name}"

    def __str__(self) -> str:
        return f"branch {self.name} {f'at {self.remote}' if self.remote else 'in this repository'}"

    def tip(self) -> str | None:
        """The newest commit, fetched if the branch is at a remote; None where there is no such branch.

        Raises:
            GateError: code 2, if the remote cannot be read.
        """
        if self.remote is None:
            return self._commit(self.ref)
        tracking = f"refs/remotes/{self.remote}/{self.name}"
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
        fetch = ("fetch", *options, "--no-auto-maintenance", self.remote, f"+{self.ref}:{tracking}")
        for wait in waits():
            done = self._ask(*fetch)
            if not done.returncode:
                return self._commit(tracking)
            said = _said(done.stderr)
            if "couldn't find remote ref" in said:
                return None
            if not any(word in said for word in BUSY):
                break
            time.sleep(wait)
        raise GateError(
            f"{self.remote} cannot be read ({_reason(said)}): see that git fetch {self.remote} works here, "
            "or give another --remote ('.' is this repository)",
            Exit.USAGE,
        )

    def entries(self, tip: str | None) -> list[Entry]:
        """All files at a commit of the branch; none without one."""
        if tip is None:
            return []
        listed = self._git("ls-tree", "-r", "-l", "-z", "--full-tree", tip).split("\0")
        cells = [
            (about.split(), path) for about, _, path in (line.partition("\t") for line in listed) if path
        ]
        return [Entry(path, oid, int(size)) for (mode, _, oid, size), path in cells if mode in FILE_MODES]

    def contents(self, oids: Sequence[str]) -> Iterator[bytes]:
        """The bytes of blobs, one after the other.

        Raises:
            GateError: if one of them is not in the repository.
        """
        for at in range(0, len(oids), AT_ONCE):
            some = oids[at : at + AT_ONCE]
            left = self._ask("cat-file", "--batch", given="".join(f"{oid}\n" for oid in some).encode()).stdout
            for oid in some:
                head, _, left = left.partition(b"\n")
                about = head.split()
                if len(about) != 3 or about[1] != b"blob":
                    raise GateError(
                        f"the {self} is not whole, it lacks {oid[:9]}: run git fetch --refetch, or git fsck"
                    )
                size = int(about[2])
                yield left[:size]
                left = left[size + 1 :]

    def keep(self, contents: bytes) -> str:
        """Write a blob; gives its id."""
        return self._git("hash-object", "-w", "--stdin", given=contents)

    def commit(self, tip: str | None, files: Mapping[str, str], message: str) -> str:
        """Make a commit that adds files, blobs by path, to those of `tip`; nothing points to it yet."""
        with tempfile.TemporaryDirectory(prefix="perf-store-") as folder:
            own = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            if tip:
                self._git("read-tree", tip, extra=own)
            lines = "".join(f"{FILE_MODES[0]} {oid}\t{path}\0" for path, oid in files.items())
            self._git(
                "update-index", "-z", "--index-info", given=lines.encode(errors="surrogateescape"), extra=own
            )
            tree = self._git("write-tree", extra=own)
        parent = ("-p", tip) if tip else ()
        return self._git("commit-tree", tree, *parent, "-m", message, extra=self._identity())

    def advance(self, tip: str | None, commit: str) -> None:
        """Make `commit` the newest one if `tip` still is.

        Raises:
            LostRaceError: if it is not, or another writer holds the branch now.
            GateError: code 2, if it may not be written.
        """
        if self.remote is None:
            log = ("-m", "perf store push")
            done = self._ask("update-ref", *log, self.ref, commit, tip or "")
        else:
            options = (
                "--porcelain",
                "--no-verify",
                "--no-follow-tags",
                "--recurse-submodules=no",
                "--no-signed",
            )
            done = self._ask("push", *options, self.remote, f"{commit}:{self.ref}")
        if not done.returncode:
            return
        said = f"{_said(done.stdout)}\n{_said(done.stderr)}"
        if "[rejected]" in said or any(word in said for word in BUSY) or self.tip() != tip:
            raise LostRaceError(_reason(said))
        raise GateError(
            f"the {self} cannot be written ({_reason(said)}): get the right to write there (in a workflow: "
            "permissions: contents: write, and a token for git), or keep runs here by --remote .",
            Exit.USAGE,
        )

    def _identity(self) -> dict[str, str]:
        """Names for a commit where the user has set none, as on a machine of CI."""
        found: dict[str, str] = {}
        for role in ("AUTHOR", "COMMITTER"):
            if self._ask("-c", "user.useConfigOnly=true", "var", f"GIT_{role}_IDENT").returncode:
                found |= {f"GIT_{role}_NAME": "perf store", f"GIT_{role}_EMAIL": "perf-store@localhost"}
        return found

    def _commit(self, ref: str) -> str | None:
        done = self._ask("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        return None if done.returncode else _said(done.stdout)

    def _ask(self, *args: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return ask_git(self.where, *PLAIN, *args, extra=ENGLISH, given=given)

    def _git(self, *args: str, given: bytes = b"", extra: Mapping[str, str] | None = None) -> str:
        return git(self.where, *PLAIN, *args, extra={**ENGLISH, **(extra or {})}, given=given)


def open_branch(where: Path, remote: str | None = None, name: str = BRANCH) -> Branch:
    """The branch `name` of the repository that the folder `where` is in.

    Args:
        remote: a remote of it, or `.` for the repository itself. None: origin, or without any remote itself.

    Raises:
        GateError: code 2, for no repository, no such remote, a name that no branch can have, or a branch here
            that is checked out: its files would be out of step with it.
    """
    found = ask_git(where, "remote", extra=ENGLISH)
    if found.returncode:
        why = _reason(_said(found.stderr))
        raise _wrong(
            f"runs are kept on a branch, and {where} is in no git repository ({why}): run it in a checkout"
        )
    if ask_git(where, "check-ref-format", f"refs/heads/{name}").returncode or name.startswith("-"):
        raise _wrong(f"--branch {name!r} is no name of a branch: {BRANCH} is one")
    known = _said(found.stdout).split()
    if remote is None and not known:
        remote = HERE
    ways = " or ".join((*known, f"{HERE} (this repository)"))
    if remote not in (None, HERE, *known):
        raise _wrong(f"--remote {remote!r} is none of this repository: give {ways}")
    if remote is None and ORIGIN not in known:
        raise _wrong(f"there is no remote {ORIGIN!r}: give --remote {ways}")
    branch = Branch(where, None if remote == HERE else remote or ORIGIN, name)
    if branch.remote is None:
        for block in git(where, "worktree", "list", "--porcelain").split("\n\n"):
            if f"branch {branch.ref}" in block.splitlines():
                tree = block.splitlines()[0].removeprefix("worktree ")
                raise _wrong(f"--branch {name} is checked out in {tree}: check out another one there")
    return branch


def waits() -> Iterator[float]:
    """Seconds to wait after each attempt, drawn, so that two writers do not meet again and again."""
    for attempt in range(ATTEMPTS):
        yield random.uniform(0, min(MOST_WAIT_S, 0.05 * 2**attempt))


def _said(text: bytes) -> str:
    return text.decode(errors="replace").strip()


def _reason(said: str) -> str:
    """What matters of git's words, in one printable line."""
    lines = [" ".join(line.split()) for line in said.splitlines()]
    told = [line for line in lines if line.startswith(("fatal:", "error:", "remote: ", "! "))]
    line = "; ".join(dict.fromkeys(told[-3:])) or (lines[-1] if lines else "git said nothing")
    return "".join(c if c.isprintable() else "?" for c in line)


def _wrong(message: str) -> GateError:
    return GateError(message, Exit.USAGE)
