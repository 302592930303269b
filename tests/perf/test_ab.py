"""`perf ab` on a small repository of its own: each revision measured in its own tree, and nothing left
behind.

What its benchmark records is written in the tree, not measured, so that verdicts are exact.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.ab import blocks
from perf.ab.main import ab
from perf.ab.revisions import commit_of
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.comparison import Outcome
from perf.gate.tolerances import Tolerance
from tests.perf.repos import git

pytestmark = pytest.mark.usefixtures("few_plugins")

TEST = """
import thing, pathlib
ROUNDS = [thing.RATE * factor for factor in (0.999, 1.0, 1.001)]
def test_thing(benchmark):
    benchmark.pedantic(int, rounds=1)
    assert pathlib.Path(thing.__file__).parents[1] == pathlib.Path(__file__).parent
    assert thing.RIGHT
    benchmark.extra_info.update(schema=1, fingerprint={"cpu": "any"}, rounds={"tokens_per_s": ROUNDS})
    benchmark.extra_info.update(backend="b", model="m", workload="w", group="g")
"""


def thing(repo, rate, right=True):
    (repo / "thing" / "__init__.py").write_text(f"RATE = {rate}\nRIGHT = {right}\n")


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository at rate 100 (`good`), 90 (`slow`) and with a wrong result (`wrong`); nothing may be left
    of it."""
    folder = tmp_path / "repo"
    (folder / "thing").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "test_thing.py").write_text(TEST)
    (folder / ".gitignore").write_text("__pycache__\nignored\n")
    for name, rate, right in (("good", 100, True), ("slow", 90, True), ("wrong", 100, False)):
        thing(folder, rate, right)
        git(folder, "add", "-A")
        git(folder, "commit", "-q", "-m", name)
        git(folder, "tag", name)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield folder
    assert list(temporary.iterdir()) == []
    assert len(git(folder, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(("pairs", "sides"), [(1, "AB"), (2, "ABBA"), (5, "ABBAABBAAB")])
def test_blocks_come_in_abba_order(pairs, sides):
    assert "".join("AB"[side] for side in blocks.order(pairs)) == sides


def test_a_slower_revision_is_a_regression_and_the_checkout_stays_as_it_was(repo):
    thing(repo, 90.5)  # uncommitted, and what "." means
    (repo / "untracked.py").write_text("")
    before = (
        git(repo, "status", "--porcelain"),
        git(repo, "rev-parse", "HEAD"),
        (repo / ".git" / "index").read_bytes(),
    )
    said: list[str] = []
    comparison = ab(
        "good", ".", ["test_thing.py"], interleave="blocks", blocks=4, repo=repo, advance=said.append
    )
    (verdict,) = comparison.verdicts
    assert (verdict.outcome, comparison.exit, comparison.design) == (Outcome.FAIL, Exit.REGRESSION, "blocks")
    assert (verdict.base, verdict.head) == (pytest.approx(100), pytest.approx(90.5))
    assert verdict.rounds == (4, 4)
    assert [line.split(": ")[1] for line in said] == ["good", ".", ".", "good", "good", ".", ".", "good"]
    assert said[0] == "block 1 of 8: good"
    assert comparison.base.commit["id"] == git(repo, "rev-parse", "good^{commit}")
    assert before == (
        git(repo, "status", "--porcelain"), git(repo, "rev-parse", "HEAD"),
        (repo / ".git" / "index").read_bytes()
    )  # fmt: skip


def test_the_working_tree_is_taken_whole_but_for_what_git_ignores(repo):
    (repo / "new.py").write_text("x = 1\n")
    (repo / "ignored").write_text("")
    (repo / "test_thing.py").unlink()
    commit = commit_of(repo, ".")
    files = git(repo, "ls-tree", "-r", "--name-only", commit).split()
    assert files == [".gitignore", "new.py", "thing/__init__.py"]
    assert git(repo, "rev-parse", f"{commit}^") == git(repo, "rev-parse", "HEAD")
    assert git(repo, "branch", "--contains", commit) == ""


def test_a_block_whose_tests_fail_ends_it_with_pytests_own_words(repo):
    with pytest.raises(
        GateError, match=r"(?s)block 2, wrong: pytest ended with code 1 .*assert thing.RIGHT"
    ) as error:
        ab("good", "wrong", ["test_thing.py"], interleave="blocks", blocks=4, repo=repo)
    assert error.value.code is Exit.NOT_COMPARABLE


@pytest.mark.parametrize(("args", "says", "code"), [
    (["test_thing.py", "-k", "nothing"], "pytest ended with code 5", Exit.NOT_COMPARABLE),
    (["test_thing.py", "--no-such-option"], "pytest ended with code 4", Exit.USAGE),
    (["test_thing.py", "--collect-only"], "pytest measured nothing", Exit.NOT_COMPARABLE),
])  # fmt: skip
def test_a_block_that_measures_nothing_is_an_error(repo, args, says, code):
    with pytest.raises(GateError, match=f"block 1, good: {says}") as error:
        ab("good", "slow", args, interleave="blocks", blocks=4, repo=repo)
    assert error.value.code is code


@pytest.mark.parametrize("way", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_interrupts_it_leaves_no_worktree(repo, way, tmp_path):
    begun = tmp_path / "begun"
    (repo / "test_thing.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "perf", "ab", ".", "good", "--", "test_thing.py"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen(command, cwd=repo, env=env, stderr=subprocess.PIPE, text=True)
    while not begun.exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(way)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted: nothing was decided, and nothing is left behind" in errors


def test_a_revision_that_is_not_there_is_a_usage_error(repo, tmp_path):
    for revision in ("nope", "--all", ""):
        with pytest.raises(GateError, match="no revision") as error:
            ab("good", revision, [], interleave="blocks", blocks=4, repo=repo)
        assert error.value.code is Exit.USAGE
    with pytest.raises(GateError, match="not a git repository"):
        ab("good", "slow", [], interleave="blocks", blocks=4, repo=tmp_path)


def test_a_revision_that_names_a_branch_and_a_tag_is_refused_with_both(repo):
    git(repo, "branch", "good", "slow")
    for revision in ("good", "good~0", "good^{commit}"):
        with pytest.raises(GateError, match="give one of refs/heads/good, refs/tags/good") as error:
            commit_of(repo, revision)
        assert error.value.code is Exit.USAGE
    assert commit_of(repo, "refs/heads/good") == commit_of(repo, "slow")
    assert commit_of(repo, "tags/good") == git(repo, "rev-parse", "slow~1")
    for name, how in (("slow", ("branch",)), ("other", ("branch",)), ("other", ("tag", "-m", "annotated"))):
        git(repo, *how, name, "refs/tags/slow")  # two names of one commit are one meaning
    for name in ("slow", "other"):
        assert commit_of(repo, name) == git(repo, "rev-parse", "refs/tags/slow")


@pytest.mark.parametrize("arg", [
    "--benchmark-json=x", "--benchmark-save=x", "--perf-baseline=x", "--benchmark-disable",
    "--benchmark-skip", "-n4", "-n", "--numprocesses=2", "--dist=load",
])  # fmt: skip
def test_pytest_options_that_take_the_measuring_away_are_refused(arg):
    with pytest.raises(GateError, match="leave it out") as error:
        ab("a", "b", ["perf", arg])
    assert error.value.code is Exit.USAGE


def test_too_few_blocks_are_refused():
    with pytest.raises(GateError, match="blocks=3 cannot decide anything: give 4 or more"):
        ab("a", "b", [], interleave="blocks", blocks=3)


def block(rounds, cpu="any", name="t::x", **info):
    what = dict.fromkeys(("backend", "model", "workload", "group"), "x")
    extra = {**what, "schema": 1, "fingerprint": {"cpu": cpu}, "rounds": rounds, **info}
    return saved_runs.parse({"benchmarks": [{"fullname": name, "extra_info": extra}]}, "block.json")


def test_merged_blocks_have_a_value_a_block_and_every_value_of_a_counter():
    one = block({"tokens_per_s": [1.0, 2.0, 4.0], "preemptions": [3, 3]}, canary_copy_gbps=10.0, seed=7)
    two = block({"tokens_per_s": [8.0], "preemptions": [3, 4]}, canary_copy_gbps=30.0, seed=7)
    (merged,) = blocks.merge([one, two], "main").benchmarks.values()
    assert merged.rounds["tokens_per_s"] == (pytest.approx(2.0), pytest.approx(8.0))
    assert merged.rounds["preemptions"] == (3, 3, 3, 4)
    assert (merged.info["canary_copy_gbps"], merged.info["seed"]) == (20.0, 7)
    assert not merged.problems


def test_one_commit_against_itself_is_said_to_measure_the_machine(repo, monkeypatch):
    monkeypatch.setattr(blocks, "block", lambda *_: block({"tokens_per_s": [100.0]}))
    same = ab("good", "slow~1", [], interleave="blocks", blocks=4, repo=repo)
    assert same.exit is Exit.PASS
    assert same.notes == (
        f"both revisions are commit {git(repo, 'rev-parse', 'good')[:12]}: whatever differs is the machine",
    )
    assert ab("good", "slow", [], interleave="blocks", blocks=4, repo=repo).notes == ()


def test_blocks_that_do_not_fit_together_are_problems():
    one = block({"tokens_per_s": [1.0]})
    for other, where, says in (
        (block({"tokens_per_s": [1.0]}, cpu="other"), "", "another fingerprint"),
        (block({"goodput": [1.0]}), "tokens_per_s", "recorded in 1 of 2 blocks"),
        (block({"tokens_per_s": [1.0]}, name="t::y"), "", "measured in 1 of 2 blocks"),
    ):
        assert says in blocks.merge([one, other], "main").benchmarks["t::x"].problems[where]


MARKED = """
import pytest
@pytest.mark.perf_gate({mark})
def test_marked(benchmark):
    benchmark.pedantic(sum, args=(range(9),), rounds=5)
"""


@pytest.mark.parametrize("conftest", [None, "pytest_plugins = ['perf.plugin']"])
def test_a_tolerance_mark_is_used_or_refused_without_a_conftest_of_ours(tmp_path, conftest):
    if conftest:
        (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_marked.py").write_text(MARKED.format(mark="'round_s', rel=0.9"))
    run = blocks.block(["test_marked.py"], tmp_path / "1.json", tmp_path, "block 1")
    (found,) = run.benchmarks.values()
    assert found.tolerances == {"round_s": Tolerance(rel=0.9)}
    (tmp_path / "test_marked.py").write_text(MARKED.format(mark="'no such', rel=0.9"))
    with pytest.raises(GateError, match=r"(?s)block 2: .*test_marked: perf_gate.*no such gated metric"):
        blocks.block(["test_marked.py"], tmp_path / "2.json", tmp_path, "block 2")


def test_a_conftest_with_an_option_of_the_same_name_has_a_way_out(tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--model')\n")
    (tmp_path / "test_plain.py").write_text("def test_plain(benchmark): benchmark.pedantic(int, rounds=5)\n")
    args = ["-p", "no:perf.plugin", "test_plain.py"]
    assert blocks.block(args, tmp_path / "1.json", tmp_path, "block 1").benchmarks


@pytest.mark.parametrize("ini", [True, False])
def test_a_block_measures_though_a_session_around_it_or_its_project_runs_in_parallel(
    tmp_path, monkeypatch, ini
):
    """In a worker of xdist, and with options for one, pytest-benchmark times nothing."""
    pytest.importorskip("xdist")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_PLUGINS")
    options = "-n 2 --dist loadfile"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = {options}\n" if ini else "[pytest]\n")
    (tmp_path / "test_plain.py").write_text("def test_plain(benchmark): benchmark.pedantic(int, rounds=5)\n")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    if not ini:
        monkeypatch.setenv("PYTEST_ADDOPTS", options)
    assert blocks.block(["test_plain.py"], tmp_path / "1.json", tmp_path, "block 1").benchmarks


def test_a_block_may_do_without_xdist(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.delenv("PYTEST_PLUGINS")
    (tmp_path / "test_plain.py").write_text("def test_plain(benchmark): benchmark.pedantic(int, rounds=5)\n")
    args = ["-p", "no:xdist", "test_plain.py"]
    assert blocks.block(args, tmp_path / "1.json", tmp_path, "block 1").benchmarks


def test_a_tree_with_an_older_package_of_ours_gets_no_plugin_that_it_lacks(tmp_path):
    (tmp_path / "perf").mkdir()
    (tmp_path / "perf" / "__init__.py").touch()
    (tmp_path / "test_plain.py").write_text("def test_plain(benchmark): benchmark.pedantic(int, rounds=5)\n")
    assert blocks.block(["test_plain.py"], tmp_path / "1.json", tmp_path, "block 1").benchmarks
