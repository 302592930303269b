"""Steps as the terminal, Markdown and the page show them; `perf report --store`, and `perf store` as its user
meets it."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from perf import cli
from perf.gate.steps import NO_STEPS, find_steps
from perf.report import markdown, page, steps_table, write
from perf.report.steps import commands
from perf.store import open_branch, push
from tests.perf.histories import NAME, history
from tests.perf.html_page import Page
from tests.perf.stored import clone, hub, save, untouched

SLOWER = {"tokens_per_s": [100.0] * 6 + [80.0] * 6, "ttft_p50_ms": [50.0] * 6 + [70.0] * 6}
COMMAND = f"python -m perf bisect 000000005 000000006 -- '{NAME}'"


def shown(renderable, width=180):
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_every_form_names_the_step_its_commits_and_the_command():
    runs = history(SLOWER)
    steps = find_steps(runs)
    terminal, summary, html = shown(steps_table(steps)), markdown(runs, steps=steps), page(runs, steps=steps)
    row = ["tokens/s", "100", "80", "-20.0%", "worse", "000000005..000000006", "2026-01-07"]
    line = next(line for line in terminal.splitlines() if "tokens/s" in line)
    assert line.split()[1:] == row
    assert commands(steps) == [COMMAND]  # for both metrics
    assert terminal.rstrip().endswith("2 steps in 2 series of 6 runs or more: advice, no verdict")
    assert f"| `test_policy[cpu-dynamic]` | {' | '.join(row)} |" in summary.replace("&#47;", "/")
    assert f"- `{COMMAND}`" in summary
    text = Page(html).text
    assert COMMAND in text
    assert "000000005..000000006" in text
    assert html.index("<h3>Steps</h3>") < html.index("<h3>Trends</h3>")


def test_where_there_is_none_that_is_said_and_where_none_could_be_nothing():
    runs = history({"tokens_per_s": [100.0] * 8})
    steps = find_steps(runs)
    says = "no step in 1 series of 6 runs or more: advice, no verdict"
    assert shown(steps_table(steps)).strip() == says
    assert says in markdown(runs, steps=steps)
    assert says in Page(page(runs, steps=steps)).text
    for form in (markdown, page):
        assert "advice" not in form(runs[:5], steps=find_steps(runs[:5]))
        assert form(runs) == form(runs, steps=NO_STEPS)


def test_of_many_steps_a_terminal_has_the_latest_and_the_page_all(tmp_path):
    runs = history(SLOWER)
    many = {f"{NAME}{n}": n for n in range(15)}
    runs = [
        type(run)(run.name, run.path, run.machine, run.commit, run.datetime,
                  {name: history(SLOWER, name=name)[at].benchmarks[name] for name in many})
        for at, run in enumerate(runs)
    ]  # fmt: skip
    steps = find_steps(runs)
    assert len(steps.found) == 30
    terminal = shown(steps_table(steps))
    assert terminal.count("worse") == 20
    assert "; 10 older ones are in the HTML page" in terminal
    write(runs, html=tmp_path / "a.html", markdown=tmp_path / "a.md", steps=steps)
    for name in ("a.html", "a.md"):
        assert (tmp_path / name).read_text().count("python -m perf bisect") == 15


def test_a_name_from_a_file_cannot_leave_its_command():
    evil = "test.py::t['; reboot #`]|"
    steps = find_steps(history(SLOWER, name=evil))
    command = """python -m perf bisect 000000005 000000006 -- 'test.py::t['"'"'; reboot #`]|'"""
    assert commands(steps) == [command]
    rendered = Page(
        MarkdownIt("commonmark").enable("table").render(markdown(history(SLOWER, name=evil), steps=steps))
    )
    assert command in "".join(rendered.text)
    steps = find_steps(history(SLOWER, name="test.py::t[\n; reboot]"))
    assert commands(steps) == []


@pytest.fixture
def run(capsys):
    """`run(args)` gives the exit code, what was printed, and the errors."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main(list(args))
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """A clone without a storage. On the branch are a baseline and ten nights, of which five are slower."""
    where = clone(hub(tmp_path_factory.mktemp("nights")), "repo")
    save(where, "baseline", 1, seed=0)
    for night in range(2, 12):
        path = save(where, "nightly", night, seed=night % 2, commit_id=f"{night:09x}{'0' * 31}")
        if night >= 7:
            data = json.loads(path.read_text())
            rounds = data["benchmarks"][0]["extra_info"]["rounds"]
            rounds["tokens_per_s"] = [0.8 * value for value in rounds["tokens_per_s"]]
            path.write_text(json.dumps(data))
    names = [f"{night:04d}_nightly" for night in range(2, 12)]
    push(["baseline", *names], open_branch(where), where / ".benchmarks")
    shutil.rmtree(where / ".benchmarks")
    return where


@pytest.fixture
def kept(nights, monkeypatch):
    """The same; we stand there, and it stays as it is."""
    monkeypatch.chdir(nights)
    before = untouched(nights)
    yield nights
    assert untouched(nights) == before
    assert not (nights / ".benchmarks").exists()


def test_push_list_and_pull(kept, run, tmp_path):
    storage = ("--storage", str(tmp_path / "runs"))
    code, out, _ = run("store", "list", "--json", str(tmp_path / "list.json"))
    rows = [line.split() for line in out.splitlines() if "Linux-" in line]
    assert code == 0
    assert "Runs on the branch perf-data at origin" in out
    assert rows[0] == ["baseline", "1", "Linux-CPython-3.12-64bit", "aaaaaaaaa", "2026-11-01", "02:10"]
    assert [row[3] for row in rows[1:]] == [f"{night:09x}" for night in range(2, 12)]
    records = json.loads((tmp_path / "list.json").read_text())["runs"]
    assert len(records) == 11
    assert records[0] == {
        "name": "baseline", "sessions": 1, "machine": "Linux-CPython-3.12-64bit", "node": "runner",
        "commit": "a" * 40, "dirty": False, "datetime": "2026-11-01T02:10:00+00:00",
        "files": ["Linux-CPython-3.12-64bit/0001_baseline.json"],
    }  # fmt: skip
    code, out, _ = run("store", "pull", "baseline", *storage)
    assert (code, out) == (0, "baseline: 1 session pulled from the branch perf-data at origin\n")
    code, out, _ = run("store", "push", "baseline", *storage)
    path = "Linux-CPython-3.12-64bit/0001_baseline.json"
    says = f"baseline: 0 sessions pushed to the branch perf-data at origin; 1 there already ({path})\n"
    assert (code, out) == (0, says)


@pytest.mark.parametrize(
    ("args", "code", "way_out"),
    [(("push", "nope"), 3, "save one with --benchmark-save=nope"),
     (("pull", "nope"), 3, "push it from where it was saved"),
     (("pull", "--branch", "other"), 3, "python -m perf store push NAME makes it"),
     (("list", "--remote", "nope"), 2, "give origin or ."),
     (("push",), 2, "Missing argument"),
     (("list", "--json", "nowhere/x.json"), 2, "name a file in a folder that is there")],
)  # fmt: skip
def test_what_cannot_be_done_ends_in_one_line_with_the_way_out(kept, run, args, code, way_out):
    found, _, err = run("store", *args)
    assert found == code
    assert way_out in err
    assert "Traceback" not in err


def test_no_repository_is_one_line_too(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("store", "list")
    assert code == 2
    assert err.startswith(f"error: runs are kept on a branch, and {tmp_path} is in no git repository")
    assert len(err.splitlines()) == 1


def test_a_report_of_the_branch_shows_its_history_and_steps_and_ends_well(kept, run, tmp_path):
    files = (
        "--html",
        str(tmp_path / "a.html"),
        "--markdown",
        str(tmp_path / "a.md"),
        "--csv",
        str(tmp_path / "a.csv"),
    )
    code, out, _ = run("report", "--store", "nightly", "--base", "baseline", *files)
    assert code == 0
    assert "baseline (aaaaaaaaa" in out
    assert "000000006..000000007" in out
    name = "perf/benchmarks/test_batch_size.py::test_batch_size[8]"
    assert out.splitlines().count(f"python -m perf bisect 000000006 000000007 -- '{name}'") == 1
    assert "10 runs, from 2026-11-02 02:10 to 2026-11-11 02:10" in (tmp_path / "a.html").read_text()
    assert "000000006..000000007" in (tmp_path / "a.md").read_text()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 11
    code, out, _ = run("report", "--store", "--last", "8")
    assert (code, "000000006..000000007" in out) == (0, True)
    code, out, _ = run("report", "--store", "nightly", "--since", "2026-11-08")
    assert (code, "bisect" in out) == (0, False)


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [((), 2, "report needs runs: name some, or give --store"),
     (("nightly", "--last", "3"), 2, "--last is of --store"),
     (("nightly", "--since", "2026-11-08"), 2, "--since is of --store"),
     (("--store", "--since", "soon"), 2, "'soon' is no date: give one as 2026-11-30"),
     (("--store", "--since", "2027-01-01"), 3, "there is nothing to show since 2027-01-01"),
     (("--store", "nope"), 3, "no run 'nope' is kept (there: baseline, nightly)"),
     (("--store", "--base", "nope"), 3, "no run 'nope' is kept")],
)  # fmt: skip
def test_a_report_of_nothing_says_why(kept, run, args, code, why):
    found, _, err = run("report", *args)
    assert found == code
    assert why in err
