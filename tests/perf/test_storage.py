"""Which saved run is meant: one meaning is taken, two are refused with both named, and a storage may be a
URL."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.utils import load_storage

from perf import cli
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.session_gate import check_session
from perf.gate.storage import resolve
from tests.perf import fake_runs

Save = Callable[..., Path]


def entries(speed: float, seed: int = 0) -> list[dict[str, Any]]:
    """One benchmark whose throughput is steady enough to judge."""
    noise = random.Random(seed)
    found = fake_runs.entry("32", "batch_size", noise, batch_size=32, **fake_runs.speeds(60_000 * speed, 32))
    rounds = found["extra_info"]["rounds"]
    found["extra_info"]["rounds"] = {
        "tokens_per_s": [60_000 * speed * factor for factor in (0.999, 1.0, 1.001, 1.0, 0.999)],
        "forward_passes": rounds["forward_passes"],
    }
    return [found]


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """`save(name, number, speed)` saves a run in a machine's folder of `.benchmarks` in the current
    directory."""
    monkeypatch.chdir(tmp_path)

    def write(
        name: str, number: int, speed: float = 1.0, machine: str = "Linux-CPython-3.12-64bit", **top: Any
    ) -> Path:
        folder = Path(".benchmarks") / machine
        folder.mkdir(parents=True, exist_ok=True)
        path = fake_runs.save(folder, name, entries(speed), number, **top)
        fake_runs.quiet(Path(".benchmarks"), [path])
        return path

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run(args)` gives the exit code of the command, what was printed, and the errors."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(args))
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return call


def refused(which: str, *candidates: str) -> str:
    with pytest.raises(GateError, match="is ambiguous") as error:
        saved_runs.load(which)
    assert error.value.code is Exit.USAGE
    assert "\n" not in str(error.value)
    for candidate in candidates:
        assert candidate in str(error.value)
    return str(error.value)


def test_a_name_that_is_also_a_number_is_refused_and_both_are_named(save: Save, run: Any):
    save("main", 1)
    save("slow", 2, 0.5)
    save("2", 3)
    code, _, err = run("compare", "main", "2")
    assert code == 2
    assert "run '2' is ambiguous" in err
    assert "0002_slow.json (its number)" in err
    assert "0003_2.json (its name)" in err
    assert "give the path of the file you mean, or its full form (0002_slow, 0003_2)" in err
    assert run("compare", "main", "0002_slow")[0] == 1
    assert run("compare", "main", "0003_2")[0] == 0
    assert run("compare", "main", "./.benchmarks/Linux-CPython-3.12-64bit/0002_slow.json")[0] == 1
    assert run("report", "main", "2")[0] == 2
    assert run("report", "main", "0003_2", "--base", "2")[0] == 2
    with pytest.raises(GateError, match="is ambiguous"):
        check_session("2")


def test_a_name_of_digits_is_taken_where_it_is_all_there_is(save: Save):
    named = save("2026", 1)
    assert saved_runs.load("2026").path == named
    both = save("2", 2)
    assert saved_runs.load("2").path == both
    assert saved_runs.load("0002").path == both


@pytest.mark.parametrize("which", ["1", "0001", "0001_main", "0001_main.json", "main"])
def test_a_run_is_meant_by_its_number_its_name_or_both(save: Save, which: str):
    path = save("main", 1)
    save("main-2", 2)
    save("Main", 3)
    save("mai", 4)
    assert saved_runs.load(which).path == path


def test_upper_and_lower_case_and_beginnings_are_other_names(save: Save):
    save("main-2", 1)
    for which in ("main", "Main-2", "MAIN-2", "main*", "main-?", "[m]ain-2", "²"):
        with pytest.raises(GateError, match="no run") as error:
            saved_runs.load(which)
        assert error.value.code is Exit.NOT_COMPARABLE
    with pytest.raises(GateError, match="give a path"):
        saved_runs.load("main*")  # no name to save a run by


def test_a_folder_here_hides_no_saved_run(save: Save, run: Any):
    path = save("main", 1)
    Path("main").mkdir()
    assert saved_runs.load("main").path == path
    Path("other").mkdir()
    with pytest.raises(GateError, match=r"no run 'other' .*'other' here is a folder"):
        saved_runs.load("other")


def test_a_file_here_of_a_saved_runs_name_is_refused_and_a_path_says_which(save: Save):
    path = save("main", 1)
    shutil.copy(path, "main")
    refused("main", "./main (a file here)", "0001_main.json (its name)")
    assert saved_runs.load("./main").path == Path("main")
    assert saved_runs.load("0001_main").path == path
    shutil.copy(path, "1")
    refused("1", "./1 (a file here)", "0001_main.json (its number)")
    shutil.copy(path, "0001_main")
    assert "full form" not in refused("0001_main", "./0001_main (a file here)", "(its file's name)")


def test_a_full_form_that_is_another_runs_name_is_refused(save: Save):
    save("main", 1)
    path = save("0001_main", 2)
    refused("0001_main", "0001_main.json (its file's name)", "0002_0001_main.json (its name)")
    assert saved_runs.load("0002_0001_main").path == path


def test_one_file_by_two_ways_is_one_meaning(save: Save):
    path = save("1", 1)
    assert saved_runs.load("1").path == path
    os.symlink(path, "1")
    assert saved_runs.load("1").path.samefile(path)


def test_two_files_of_one_number_are_refused(save: Save):
    save("a", 7)
    save("b", 7)
    refused("7", "0007_a.json", "0007_b.json")
    assert saved_runs.load("b").name == "b"


def test_a_run_in_the_folders_of_two_machines_is_refused_by_every_word(save: Save):
    save("main", 1)
    there = save("main", 1, machine="Linux-CPython-3.13-64bit")
    for which in ("main", "1", "0001", "0001_main"):
        assert "full form" not in refused(which, "Linux-CPython-3.12-64bit", "Linux-CPython-3.13-64bit")
    assert saved_runs.load(str(there)).path == there


def of(commit: str, dirty: bool = False) -> dict[str, Any]:
    return {"commit_info": {"id": commit * 40, "dirty": dirty}}


def test_a_name_means_all_sessions_of_the_last_ones_commit_and_that_is_said(save: Save, run: Any):
    """Not the latest three, nor the neighbours alone: whatever measured the same code."""
    for number, speed, commit in (
        (9, 1.001, "a"),
        (10, 1.0, "a"),
        (2, 0.5, "b"),
        (3, 0.999, "a"),
        (4, 0.2, "c"),
    ):
        save("main", number, speed, **of(commit))
    save("next", 11, **of("d"))
    main = saved_runs.load("main")
    assert [path.name for path in main.paths] == ["0003_main.json", "0009_main.json", "0010_main.json"]
    says = "2 of 5 runs saved as 'main' are of other commits, and left out: 0002_main, 0004_main"
    code, out, _ = run("compare", "main", "next")
    assert code == 0
    assert says in out
    assert "main (aaaaaaaaa, 3 sessions) -> next (ddddddddd, 1 session)" in out
    assert says in run("report", "main")[2]
    assert says in run("report", "next", "--base", "main")[1]
    assert (saved_runs.load("0009_main").notes, saved_runs.load("9").sessions) == ((), 1)
    assert check_session("main").notes == (says,)
    assert check_session("main").sessions == 3


def test_sessions_with_uncommitted_changes_are_others_than_those_without(save: Save):
    save("main", 1, **of("a"))
    save("main", 2, **of("a", dirty=True))
    assert saved_runs.load("main").paths == (Path(".benchmarks/Linux-CPython-3.12-64bit/0002_main.json"),)
    save("main", 3, **of("a", dirty=True))
    run = saved_runs.load("main")
    assert run.sessions == 2
    assert run.notes == (
        "1 of 3 runs saved as 'main' are of other commits, and left out: 0001_main",
        "2 sessions of 'main' have uncommitted changes, taken for the same: 0003_main is the last one alone",
    )


def test_sessions_of_no_repository_are_of_one_code(save: Save):
    for number in (1, 2):
        save("main", number, commit_info={"id": "unversioned", "dirty": False})
    assert (saved_runs.load("main").sessions, saved_runs.load("main").notes) == (2, ())


def test_an_earlier_session_that_cannot_be_read_is_left_out_and_named(save: Save):
    save("main", 1, **of("a")).write_text("{")
    save("main", 2, **of("a"))
    run = saved_runs.load("main")
    assert run.sessions == 1
    assert run.notes[0].startswith("left out of 'main': run ")
    assert "0001_main.json' cannot be read as JSON" in run.notes[0]
    save("main", 3).write_text("{")
    with pytest.raises(GateError, match=r"0003_main\.json' cannot be read"):  # what is meant must be whole
        saved_runs.load("main")


@pytest.mark.parametrize("pair", [("main", "main"), ("main", "2"), ("0001_main", "main"), ("1", "0001_main")])
def test_a_session_is_not_compared_with_itself(save: Save, run: Any, pair: tuple[str, str]):
    for number in (1, 2):
        save("main", number, **of("a"))
    code, _, err = run("compare", *pair)
    assert code == 2
    assert "both have the session .benchmarks" in err
    assert run("compare", "1", "2")[0] == 0
    assert "which always equals itself" in run("report", "main", "1")[1]


def test_words_that_name_nothing(save: Save, run: Any):
    save("main", 1)
    words = ("x" * 5000, "9" * 5000, "a/b", "nothing.json", "./main")
    for which, code in (("", 2), *((word, 3) for word in words)):
        with pytest.raises(GateError) as error:
            saved_runs.load(which)
        assert error.value.code == code
    assert run("report", "main", "--base", "")[0] == 2


@pytest.mark.parametrize(
    "url", ["file://./.benchmarks", "file://.benchmarks", "file://{here}/.benchmarks", ".benchmarks"]
)
def test_a_storage_is_read_as_pytest_benchmark_reads_it(save: Save, run: Any, tmp_path: Path, url: str):
    path = save("main", 1)
    save("slow", 2, 0.5)
    storage = url.format(here=tmp_path)
    assert resolve("main", storage).path.samefile(path)
    theirs = load_storage(storage, logger=None, default_machine_id=None, netrc="")
    assert theirs.path == resolve("main", storage).path.parents[1].resolve()
    assert run("compare", "main", "slow", "--storage", storage)[0] == 1
    assert run("report", "main", "--storage", storage)[0] == 0


@pytest.mark.parametrize("url", ["elasticsearch+http://user:secret@here:9200/i/t", "elasticsearch://here"])
def test_elasticsearch_is_refused_by_name(save: Save, run: Any, url: str):
    save("main", 1)
    for command in (("compare", "main", "main"), ("report", "main")):
        code, _, err = run(*command, "--storage", url)
        assert code == 2
        assert "is an Elasticsearch index" in err
        assert "secret" not in err
        assert len(err.splitlines()) == 1
    assert "error: storage s3://... is no folder" in run("report", "main", "--storage", "s3://bucket")[2]
