"""Small repositories for tests of `perf bisect`, and a judge that is made up for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from perf.ab.bisect import Bisection
from perf.gate.comparison import Comparison, Outcome, Verdict
from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run
from tests.perf.repos import git

TEST = "bench/test_it.py::test_it[a-b]"
LINE = {f"c{n}": [f"c{n - 1}"] if n else [] for n in range(17)}  # c0 is good, 16 commits follow
RUN = Run("run", Path("run.json"), {}, {}, "", {})
KINDS = {
    "good": Outcome.PASS,
    "bad": Outcome.FAIL,
    "unsure": Outcome.INCONCLUSIVE,
    "incomparable": Outcome.ERROR,
}


def made(folder, parents):
    """A repository with a commit and a tag a name, made at once; its checkout is the last commit."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    lines = ["feature done"]
    for number, (name, before) in enumerate(parents.items(), 1):
        who = f"A. Author <author@example.org> {1_700_000_000 + number} +0000"
        marks = [list(parents).index(parent) + 1 for parent in before]
        links = [f"{'merge' if at else 'from'} :{mark}" for at, mark in enumerate(marks)]
        lines += ["reset refs/heads/main", "commit refs/heads/main", f"mark :{number}"]
        lines += [f"author {who}", f"committer {who}", f"data {len(name) + 9}", f"change {name}\n", *links]
        lines += ["M 644 inline bench/test_it.py", "data 2\n#\n", f"M 644 inline {name}", "data 0\n"]
        lines += [f"reset refs/tags/{name}", f"from :{number}", ""]
    stream = "\n".join([*lines, "done", ""])
    subprocess.run(["git", "fast-import", "--quiet"], cwd=folder, input=stream, text=True, check=True)
    git(folder, "reset", "-q", "--hard")
    return folder


def row(folder):
    """c0 to c16, with a change that is not committed, and a bisection of its user under way."""
    made(folder, LINE)
    (folder / "bench" / "test_it.py").write_text("# changed\n")
    git(folder, "bisect", "start", "--no-checkout", "c9", "c2")
    assert (folder / ".git" / "BISECT_LOG").is_file()
    return folder


def state(folder):
    """All that a bisection must leave alone: HEAD, index, status, refs, and every file of .git by name."""
    own = folder / ".git"
    status = subprocess.run(
        ["git", "--no-optional-locks", "status", "--porcelain"], cwd=folder, capture_output=True, check=True
    ).stdout
    files = {str(path.relative_to(own)) for path in own.rglob("*") if "objects" not in path.parts}
    contents = {name: (own / name).read_bytes() for name in files if (own / name).is_file()}
    return status, files, contents


def verdict(outcome, metric="tokens_per_s", benchmark=TEST, effect=0.0):
    known = dict(base=100.0, head=100 * (1 + effect), effect=effect, low=effect - 0.01, high=effect + 0.01)
    return Verdict(
        benchmark, "g", METRICS[metric], outcome, f"{outcome} of {metric}", **known, tolerance=0.03
    )


class Judge:
    """Finds of each commit what its name says, and of others what their history says; keeps what it was
    asked."""

    def __init__(self, folder, parents, culprit, kinds=None, unfit=()):
        tags = (row.split() for row in git(folder, "show-ref", "--tags").splitlines())
        self.names = {name: ref.removeprefix("refs/tags/") for name, ref in tags}
        self.parents, self.culprit, self.kinds = parents, culprit, kinds or {}
        self.unfit = unfit  # commits without what made the good end fast
        self.asked = []

    def ancestors(self, name):
        return {name}.union(*(self.ancestors(parent) for parent in self.parents[name]))

    def kind(self, name):
        slow = self.culprit in self.ancestors(name) or name in self.unfit
        return self.kinds.get(name, "bad" if slow else "good")

    def __call__(self, base, head, args, *, budget):
        name = self.names[head]
        self.asked.append((name, budget, list(args)))
        kind = self.kind(name)
        if isinstance(kind, BaseException):
            raise kind
        effect = -0.2 if kind == "bad" else 0.0
        return Comparison(RUN, RUN, (verdict(KINDS[kind], effect=effect), verdict(Outcome.PASS, "goodput")))

    @property
    def commits(self):
        return [name for name, _, _ in self.asked]


def found(folder, judge, good="c0", bad="c16", **options):
    """The report, and the names of its suspects."""
    report = Bisection(good, bad, ["bench", "-q"], judge, repo=folder, **options).run()
    return report, [judge.names[suspect.id] for suspect in report.suspects]
