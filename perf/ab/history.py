"""Commits between a good and a bad one: which of them remain suspects, and which to judge next, by git's own
bisection.

It asks `git rev-list` and nothing else of git: no checkout, no ref and no file of a `git bisect`, so that a
bisection that its user has under way goes on undisturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.ab.revisions import commit_of, git
from perf.errors import Exit, GateError
from perf.gate.saved_runs import SHORT

FIELDS = ("%H", "%an <%ae>", "%aI", "%s")


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit as people know it. date: its author's, in ISO 8601."""

    id: str
    author: str
    date: str
    subject: str

    @property
    def short(self) -> str:
        return self.id[:SHORT]


class History:
    """The commits that `bad` has and `good` has not, narrowed down by what is found of some of them.

    A good one clears all its ancestors, a bad one all that are not its ancestors, a skipped one nobody.
    `suspects` are the commits of which one is the first bad commit: `worst`, the earliest that is known to be
    bad, and its ancestors that no good commit has.
    """

    def __init__(self, top: Path, good: str, bad: str, *, first_parent: bool = False) -> None:
        """Begin with revisions `good` and `bad` of the repository in `top`.

        Args:
            first_parent: take a merge for one commit, and leave alone what it merged.

        Raises:
            GateError: code 2, if a revision is not there, or `good` is not an ancestor of `bad`.
        """
        self.top = top
        self._follow = ["--first-parent"] if first_parent else []
        self.good, self.bad = (commit_of(top, revision) for revision in (good, bad))
        self._check_ends(good, bad)
        self._known = self._read(*self._follow, self.bad, f"^{self.good}")
        self._cleared, self._skipped, self.worst = [self.good], set[str](), self.bad
        self._by_distance = self._ask()

    def _check_ends(self, good: str, bad: str) -> None:
        if self.good == self.bad:
            same = f"{good!r} and {bad!r} are one commit, {self.good[:SHORT]}: nothing lies between them"
            raise GateError(same, Exit.USAGE)
        if not self.has(self.bad, self.good):
            why = f"{good!r} is not an ancestor of {bad!r}"
            if self.has(self.good, self.bad):
                why += f", but {bad!r} of {good!r}: give the good one, which is the older, first"
            elif git(self.top, "rev-parse", "--is-shallow-repository") == "true":
                why += " in what this shallow clone has of them: run git fetch --unshallow"
            else:
                why += f": give one, as git merge-base {good} {bad} names it"
            raise GateError(why, Exit.USAGE)

    def has(self, commit: str, ancestor: str) -> bool:
        """Return whether `ancestor` is in the history of `commit`, or is that commit."""
        return not git(self.top, "rev-list", "--max-count=1", ancestor, f"^{commit}")

    def commit(self, name: str) -> Commit:
        """A commit by its full id."""
        if name not in self._known:
            self._known |= self._read("--max-count=1", name)
        return self._known[name]

    @property
    def suspects(self) -> list[str]:
        """The commits of which one is the first bad one, newest first."""
        left = set(self._by_distance)
        return [name for name in self._known if name in left]

    def next(self) -> str | None:
        """The commit that halves the suspects best; None once only one is left, or none that can be judged.

        Beside one that was skipped others are likely to be broken too, and trying them costs as much as any.
        So where the best are near such ones, the step away from them doubles with each that is skipped.
        """
        others = [name for name in self._by_distance if name != self.worst]
        left = [name for name in others if name not in self._skipped]
        skipped = len(others) - len(left)
        if not left or not self._skipped.intersection(others[: skipped + 1]):
            return left[0] if left else None
        return left[min(2**skipped, len(left)) - 1]

    def clear(self, good: str) -> None:
        """Take a commit for good, with all its ancestors."""
        self._cleared.append(good)
        self._by_distance = self._ask()

    def condemn(self, bad: str) -> None:
        """Take a commit for bad: it or an ancestor of it is the first."""
        self.worst = bad
        self._by_distance = self._ask()

    def skip(self, name: str) -> None:
        """Leave a commit unjudged."""
        self._skipped.add(name)

    def forks(self, name: str) -> list[str]:
        """The commits at which a history left that of `good`: the latest that both have."""
        lines = git(self.top, "rev-list", "--boundary", name, f"^{self.good}").splitlines()
        shared = [line[1:] for line in lines if line.startswith("-")]
        return git(self.top, "merge-base", "--independent", *shared).splitlines() if shared else []

    def nearest(self, names: Sequence[str]) -> str | None:
        """Of some commits the ancestor of `worst` with the fewest commits between; None without any.

        Commits that `good` has do not count.
        """
        between = {
            name: int(git(self.top, "rev-list", "--count", self.worst, f"^{name}"))
            for name in names
            if self.has(self.worst, name) and not self.has(self.good, name)
        }
        return min(between, key=lambda name: between[name], default=None)

    def _ask(self) -> list[str]:
        """The suspects, the one that halves them best first."""
        cleared = [f"^{name}" for name in self._cleared]
        lines = git(self.top, "rev-list", "--bisect-all", *self._follow, self.worst, *cleared).splitlines()
        return [line.split()[0] for line in lines]

    def _read(self, *which: str) -> dict[str, Commit]:
        """Commits by their id, newest first; `which` is as for `git log`."""
        form = "%x00".join(FIELDS)
        said = git(self.top, "log", "-z", "--topo-order", "--no-show-signature", f"--format={form}", *which)
        cells = said.split("\0")
        rows = [cells[at : at + len(FIELDS)] for at in range(0, len(cells) - 1, len(FIELDS))]
        return {name: Commit(name, author, date, subject) for name, author, date, subject in rows}
