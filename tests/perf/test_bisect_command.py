"""`perf bisect` as its user meets it: what is shown and written, codes, budgets, what pytest is given."""

from __future__ import annotations

import json

import pytest

from perf import cli, console
from perf.ab.narrow import narrowed
from perf.errors import GateError
from tests.perf.bisected import LINE, TEST, Judge


@pytest.mark.parametrize(("args", "options"), [
    (["bench"], []),
    (["bench/", "-q", "bench/test_it.py::test_it"], ["-q"]),
    (["./bench", "-k", "c3", "-m", "not slow"], ["-k", "c3", "-m", "not slow"]),
    (["-kbench", "bench", "--benchmark-min-rounds=5"], ["-kbench", "--benchmark-min-rounds=5"]),
    (["--benchmark-min-rounds", "5", "bench"], ["--benchmark-min-rounds", "5"]),
    (["-p", "bench", "-vv", "bench"], ["-p", "bench", "-vv"]),
    (["-m", "gpu"], ["-m", "gpu"]),
])  # fmt: skip
def test_only_the_benchmarks_that_failed_are_measured_again(repo, args, options):
    assert narrowed(args, [TEST], repo, ["c0", "c16"]) == [*options, TEST]


@pytest.mark.parametrize(("args", "name"), [
    (["--unknown", "bench"], TEST),  # its value, or a path
    (["-xk", "bench"], TEST),
    (["--pyargs", "bench"], TEST),
    (["--rootdir", "bench", "bench"], TEST),
    (["-c", "bench/pytest.ini"], TEST),
    (["bench", "--", "bench"], TEST),
    (["@bench"], TEST),
    (["bench"], "test_it.py::test_it"),  # counts from elsewhere
    (["bench"], "c16::test_it"),  # is not in the good end
    (["bench"], "no test id"),
])  # fmt: skip
def test_arguments_that_might_mean_another_thing_stay_whole(repo, args, name):
    assert narrowed(args, [name], repo, ["c0", "c16"]) == args


@pytest.fixture
def run(repo, monkeypatch, capsys):
    """`run(judge, args)` gives the exit code of `perf bisect` there, what was printed, and the errors."""

    def call(judge, *args):
        def measure(base, head, args, *, budget, counters, serving):
            measure.counters = counters
            return judge(base, head, args, budget=budget)

        monkeypatch.chdir(repo)
        monkeypatch.setattr("perf.ab.main.ab", measure)
        with pytest.raises(SystemExit) as end:
            cli.main(["bisect", *args])
        return end.value.code, *capsys.readouterr()

    return call


def test_the_command_shows_the_commit_and_writes_all_of_it(run, repo, tmp_path):
    judge = Judge(repo, LINE, "c7")
    file = tmp_path / "found.json"
    code, out, err = run(judge, "c0", "c16", "--budget", "2m", "--json", str(file), "--", "bench", "-q")
    ids = {name: commit for commit, name in judge.names.items()}
    assert code == 0
    last, described = out.rstrip().splitlines()[-1], out.rstrip().splitlines()[-2]
    assert last == f"{ids['c7'][:9]} is the first bad commit"
    assert described == f"{ids['c7'][:9]}  2023-11-14  A. Author <author@example.org>  change c7"
    assert out.count("-20.0%") >= 2
    assert f"First that is worse: {ids['c7'][:9]} change c7" in out
    assert f"Last that is not: {ids['c6'][:9]} change c6" in out
    assert err.splitlines()[1] == f"commit 1 of about 4: {ids['c8'][:9]} change c8"
    assert judge.asked[0] == ("c16", 120.0, ["bench", "-q"])
    data = json.loads(file.read_text())
    assert set(data) == {
        "exit", "outcome", "good", "bad", "metrics", "first_bad", "suspects", "condemned", "last_good",
        "judgements",
    }  # fmt: skip
    assert (data["exit"], data["outcome"]) == (0, "found")
    assert data["metrics"] == [{"benchmark": TEST, "metric": "tokens_per_s"}]
    commit = {"id": ids["c7"], "author": "A. Author <author@example.org>", "subject": "change c7"}
    assert data["first_bad"] == {**commit, "date": "2023-11-14T22:13:28+00:00"}
    assert data["suspects"] == [data["first_bad"]]
    assert data["condemned"] in data["judgements"]
    assert data["condemned"]["commit"] == data["first_bad"]
    assert set(data["condemned"]) == {"commit", "outcome", "reason", "verdicts", "budget", "seconds"}
    (record,) = data["condemned"]["verdicts"]
    assert (record["benchmark"], record["metric"], record["outcome"]) == (TEST, "tokens_per_s", "FAIL")
    assert [record[key] for key in ("effect", "low", "high")] == pytest.approx([-0.2, -0.21, -0.19])
    assert data["last_good"]["outcome"] == "good"
    assert [j["commit"]["subject"] for j in data["judgements"]][:2] == ["change c16", "change c8"]


def test_the_command_lists_what_remains_and_ends_with_code_4(run, repo, tmp_path):
    broken = GateError("block 2, c7: pytest ended with code 1\nE   ImportError")
    judge = Judge(repo, LINE, "c7", {"c7": broken, "c6": broken})
    code, out, _ = run(judge, "c0", "c16", "--json", str(tmp_path / "x.json"))
    lines = out.rstrip().splitlines()
    assert code == 4
    assert lines[-1] == "the first bad commit is one of these 3: those between cannot be judged"
    assert [row.split()[-1] for row in lines[-4:-1]] == ["c8", "c7", "c6"]
    assert "ImportError" not in out
    data = json.loads((tmp_path / "x.json").read_text())
    assert (data["exit"], data["outcome"], data["first_bad"]) == (4, "several", None)
    assert any(j["reason"].endswith("ImportError") for j in data["judgements"])


def test_the_command_interrupted_shows_what_was_judged(run, repo, tmp_path):
    judge = Judge(repo, LINE, "c7", {"c4": KeyboardInterrupt()})
    code, out, err = run(judge, "c0", "c16", "--json", str(tmp_path / "x.json"))
    assert code == console.INTERRUPTED
    assert "change c8" in out
    assert "the first bad commit is one of these 8: it was interrupted" in out
    assert err.splitlines()[-1] == "interrupted: 2 judgements were made, and nothing is left behind"
    data = json.loads((tmp_path / "x.json").read_text())
    assert (data["exit"], data["outcome"], len(data["judgements"])) == (130, "interrupted", 2)
    code, out, err = run(Judge(repo, LINE, "c7", {"c16": KeyboardInterrupt()}), "c0", "c16")
    assert (code, out) == (130, "")


def test_the_command_ends_with_one_line_where_there_is_nothing_to_find(run, repo):
    code, out, err = run(Judge(repo, LINE, "none"), "c0", "c16", "--no-counters")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: nothing got worse between ")
    assert run(Judge(repo, LINE, "c7"), "c0", "c16", "--json", "nowhere/x.json")[0] == 2
    code, _, err = run(Judge(repo, LINE, "c7"), "c16", "c0")
    assert code == 2
    assert "give the good one, which is the older, first" in err


@pytest.mark.parametrize(("text", "found"), [
    ("90", 90), ("90s", 90), ("2m", 120), ("1m30s", 90), ("1.5h", 5400), ("0.5", 0.5), (300.0, 300),
    ("168h", 604800),
])  # fmt: skip
def test_lengths_of_time_are_read(text, found):
    assert console.seconds(text) == found


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "2x", "m", "nan", "inf", "1e9", "169h", "2 m", "s2", "1.2.3"]
)
def test_what_is_no_length_of_time_is_refused_by_its_option(run, repo, text):
    judge = Judge(repo, LINE, "c7")
    code, _, err = run(judge, "c0", "c16", f"--budget={text}")
    assert (code, judge.asked) == (2, [])
    assert "--budget" in err
    assert "give seconds" in " ".join(err.replace("│", " ").split())
