"""`perf bisect` on commits in a row with a judge that is made up: the right one, and nothing touched."""

from __future__ import annotations

import signal

import pytest

from perf.ab.bisect import Bisection, Finding
from perf.ab.history import History
from perf.errors import Exit, GateError
from perf.gate.comparison import Comparison, Outcome, Verdict
from tests.perf.bisected import LINE, RUN, TEST, Judge, found, made, verdict
from tests.perf.repos import commit, git


@pytest.mark.parametrize("position", range(1, 17))
def test_the_commit_is_found_wherever_it_is(repo, position):
    judge = Judge(repo, LINE, f"c{position}")
    lines = []
    report, suspects = found(repo, judge, advance=lines.append)
    assert suspects == [f"c{position}"]
    assert (report.exit, report.outcome) == (Exit.PASS, "found")
    assert len(judge.asked) == len(set(judge.commits)) == 5  # the ends, then half after half of 16
    assert {budget for _, budget, _ in judge.asked} == {300.0}
    assert report.first_bad.subject == f"change c{position}"
    assert report.condemned.commit == report.first_bad
    assert [v.effect for v in report.condemned.verdicts] == [-0.2]
    before = report.last_good.commit.subject if report.last_good else "change c0"
    assert before == f"change c{position - 1}"
    assert lines[0].startswith("the ends, ")
    assert [row.split(":")[0] for row in lines[1:]] == [f"commit {n} of about 4" for n in range(1, 5)]
    assert lines[1].split(": ")[1].endswith("change c8")


@pytest.mark.parametrize("kind", [
    "unsure", "incomparable", GateError("pytest ended with code 1"), GateError("code 4", Exit.USAGE)
])  # fmt: skip
@pytest.mark.parametrize("skipped", [{"c8"}, {"c7", "c8", "c9", "c10"}, {"c1", "c15"}])
def test_a_commit_that_cannot_be_judged_and_is_elsewhere_is_passed_by(repo, kind, skipped):
    culprit = "c4"
    judge = Judge(repo, LINE, culprit, dict.fromkeys(skipped, kind))
    report, suspects = found(repo, judge)
    assert suspects == [culprit]
    assert report.exit is Exit.PASS


def test_a_commit_beside_those_that_cannot_be_judged_is_listed_with_them(repo):
    broken = GateError("block 2: pytest ended with code 1\nE  ImportError")
    judge = Judge(repo, LINE, "c11", {"c11": broken, "c10": "unsure", "c12": "incomparable", "c3": broken})
    report, suspects = found(repo, judge)
    assert suspects == ["c13", "c12", "c11", "c10"]
    assert (report.exit, report.outcome, report.first_bad) == (Exit.INCONCLUSIVE, "several", None)
    assert report.condemned.commit.subject == "change c13"
    assert report.last_good.commit.subject == "change c9"
    found_of = {j.commit.subject.split()[1]: j.finding for j in report.judgements}
    assert found_of["c10"] is Finding.CANT_TELL
    assert found_of["c11"] is found_of["c12"] is Finding.BROKEN


def test_beside_a_commit_that_cannot_be_judged_not_all_the_others_are_tried(repo):
    """Half of the commits are broken; the halves that git gives first are in the midst of them."""
    broken = {f"c{n}": GateError("no build") for n in range(5, 13)}
    for culprit in ("c2", "c14"):
        judge = Judge(repo, LINE, culprit, broken)
        assert found(repo, judge)[1] == [culprit]
        assert len(broken.keys() & judge.commits) <= len(broken) / 2


def test_the_budget_is_doubled_once_where_it_could_not_tell(repo):
    class Patient(Judge):
        def kind(self, name):
            enough = {"c16": 20, "c8": 20, "c4": 80}.get(name, 10)
            return super().kind(name) if self.asked[-1][1] >= enough else "unsure"

    judge, lines = Patient(repo, LINE, "c3"), []
    report, suspects = found(repo, judge, budget=10, advance=lines.append)
    asked = [(name, budget) for name, budget, _ in judge.asked]
    assert asked[:6] == [("c16", 10), ("c16", 20), ("c8", 10), ("c8", 20), ("c4", 10), ("c4", 20)]
    assert {budget for _, budget in asked[6:]} == {10}  # c4 was left out, not asked a third time
    assert suspects == ["c3"]
    assert lines[1].endswith(", again for 20 s")
    assert lines[3].startswith("commit 1 of about 4, again for 20 s: ")
    assert [j.budget for j in report.judgements[:2]] == [20, 10]


@pytest.mark.parametrize(("kind", "code", "says", "times"), [
    ("good", Exit.USAGE, "nothing got worse between .*: there is no commit to find", 1),
    ("unsure", Exit.INCONCLUSIVE, "nobody can tell .*INCONCLUSIVE of tokens_per_s; .* larger --budget", 2),
    ("incomparable", Exit.NOT_COMPARABLE, "cannot be compared: ERROR of tokens_per_s", 1),
    (GateError("no such option", Exit.USAGE), Exit.USAGE, "no such option", 1),
])  # fmt: skip
def test_ends_without_a_regression_end_it(repo, kind, code, says, times):
    judge = Judge(repo, LINE, "c3", {"c16": kind})
    with pytest.raises(GateError, match=says) as error:
        found(repo, judge, budget=5)
    assert error.value.code is code
    assert [budget for _, budget, _ in judge.asked] == [5, 10][:times]


@pytest.mark.parametrize(("good", "bad", "says"), [
    ("c9", "c2", "'c9' is not an ancestor of 'c2', but 'c2' of 'c9': give the good one, .*, first"),
    ("c2", "c2", "'c2' and 'c2' are one commit"),
    ("c2", "nowhere", "no revision 'nowhere'"),
])  # fmt: skip
def test_ends_that_are_none_are_refused_before_anything_is_measured(repo, good, bad, says):
    judge = Judge(repo, LINE, "c3")
    with pytest.raises(GateError, match=says) as error:
        found(repo, judge, good, bad)
    assert error.value.code is Exit.USAGE
    assert judge.asked == []


def test_ends_on_two_branches_are_refused(tmp_path):
    folder = made(tmp_path / "repo", {"c0": [], "left": ["c0"], "right": ["c0"], "alone": []})
    for bad in ("right", "alone"):
        with pytest.raises(
            GateError, match=f"'left' is not an ancestor of '{bad}': give one, as git merge-base"
        ):
            History(folder, "left", bad)
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{folder}", "shallow")
    shallow = tmp_path / "shallow"
    (shallow / "new").touch()
    commit(shallow, "later")
    git(shallow, "fetch", "-q", "--depth=1", "origin", "tag", "left")
    with pytest.raises(GateError, match="in what this shallow clone has of them: run git fetch --unshallow"):
        History(shallow, "left", "later")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", [1, 3])
def test_interrupted_it_tells_what_was_judged(repo, number, when):
    judge = Judge(repo, LINE, "c3")

    def interrupt(base, head, args, *, budget):
        if len(judge.asked) == when:
            signal.raise_signal(number)
        return judge(base, head, args, budget=budget)

    handlers = signal.getsignal(signal.SIGTERM)
    search = Bisection("c0", "c16", ["bench"], interrupt, repo=repo)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert signal.getsignal(signal.SIGTERM) is handlers
    report = search.report()
    assert (report.outcome, report.first_bad) == ("interrupted", None)
    assert [judge.names[j.commit.id] for j in report.judgements] == ["c16", "c8", "c4"][:when]
    assert len(report.suspects) == {1: 16, 3: 4}[when]


def test_a_search_of_which_nothing_was_judged_has_found_nothing(repo):
    search = Bisection("c15", "c16", ["bench"], Judge(repo, LINE, "c16"), repo=repo)
    assert search.report().outcome == "interrupted"
    assert search.run().outcome == "found"


def test_only_what_fails_between_the_ends_counts(repo):
    """tokens/s fails from c5 on; goodput fails in the middle alone, and another benchmark comes and goes."""

    def judge(base, head, args, *, budget):
        number = int(git(repo, "describe", "--tags", head)[1:])
        speed = verdict(Outcome.FAIL if number >= 5 else Outcome.PASS)
        gone = Verdict("other.py::test_x", "g", None, Outcome.ERROR, "is not in this run")
        rest = [verdict(Outcome.FAIL, "goodput"), gone] if number < 16 else [verdict(Outcome.PASS, "goodput")]
        return Comparison(RUN, RUN, (*rest, speed))

    report = Bisection("c0", "c16", ["bench"], judge, repo=repo).run()
    assert report.first_bad.subject == "change c5"
    assert report.wanted == ((TEST, "tokens_per_s"),)


def test_one_of_several_that_fails_is_enough_and_all_must_pass(repo):
    """tokens/s fails from c9, TTFT from c12; between c5 and c8 nobody can tell of TTFT."""

    def judge(base, head, args, *, budget):
        number = int(git(repo, "describe", "--tags", head)[1:])
        late = Outcome.FAIL if number >= 12 else Outcome.INCONCLUSIVE if 5 <= number <= 8 else Outcome.PASS
        speed = verdict(Outcome.FAIL if number >= 9 else Outcome.PASS)
        return Comparison(RUN, RUN, (verdict(late, "ttft_p50_ms"), speed))

    report = Bisection("c0", "c16", ["bench"], judge, repo=repo).run()
    assert [suspect.subject.split()[1] for suspect in report.suspects] == ["c9", "c8", "c7", "c6", "c5"]
    assert report.outcome == "several"


def test_a_benchmark_or_metric_that_is_not_there_is_skipped(repo):
    def judge(base, head, args, *, budget):
        number = int(git(repo, "describe", "--tags", head)[1:])
        if number in (7, 8):
            gone = Verdict(TEST, "g", None, Outcome.ERROR, "is not in this run") if number == 8 else None
            return Comparison(RUN, RUN, (gone,) if gone else (verdict(Outcome.PASS, "goodput"),))
        return Comparison(RUN, RUN, (verdict(Outcome.FAIL if number >= 6 else Outcome.PASS),))

    report = Bisection("c0", "c16", ["bench"], judge, repo=repo).run()
    assert report.first_bad.subject == "change c6"
    why = {j.commit.subject: j.reason for j in report.judgements if j.finding is Finding.BROKEN}
    assert why["change c8"] == "is not in this run"


def test_the_ends_are_given_the_arguments_whole_and_commits_the_benchmarks_that_failed(repo):
    judge = Judge(repo, LINE, "c3")
    found(repo, judge)
    assert [args for _, _, args in judge.asked] == [["bench", "-q"]] + 4 * [["-q", TEST]]


def test_a_commit_that_does_not_know_a_test_id_is_asked_by_the_arguments_as_they_were(repo):
    class Renamed(Judge):
        def __call__(self, base, head, args, *, budget):
            comparison = super().__call__(base, head, args, budget=budget)
            if TEST in args and self.names[head] == "c4":
                raise GateError("not found", Exit.USAGE)
            return comparison

    judge = Renamed(repo, LINE, "c4")
    assert found(repo, judge)[1] == ["c4"]
    assert [args for name, _, args in judge.asked if name == "c4"] == [["-q", TEST], ["bench", "-q"]]


def test_the_working_tree_is_a_bad_end_too(repo):
    judge = Judge(repo, LINE, "c16")

    def judged(base, head, args, *, budget):
        if head in judge.names:
            return Comparison(RUN, RUN, (verdict(Outcome.PASS),))
        return Comparison(RUN, RUN, (verdict(Outcome.FAIL),))

    report = Bisection("c0", ".", ["bench"], judged, repo=repo).run()
    assert report.first_bad.subject == "the working tree as it was"
