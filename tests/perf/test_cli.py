"""`python -m perf` as its user meets it: exit codes, files, one line for what can be mended, no torch without
need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from perf import cli
from perf.ab import selftest
from perf.errors import GateError
from perf.gate.comparison import Outcome
from tests.perf import fake_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Saved runs `main`, `again` (the same code), `slow` (12 % slower), `less` (fewer benchmarks); we stand
    there. Sessions of this machine are known to agree, so that one a side is enough."""
    folder = tmp_path / ".benchmarks" / "Linux"
    folder.mkdir(parents=True)
    kinds = {"main": (0, 1.0, None), "again": (1, 1.0, None), "slow": (2, 0.88, None), "less": (3, 1.0, 3)}
    for number, (name, (seed, speed, most)) in enumerate(kinds.items(), 1):
        fake_runs.save(folder, name, fake_runs.benchmarks(seed, speed)[:most], number)
    for number, name in ((8, "startup"), (9, "restarted")):
        fake_runs.save(
            folder, name, [entry for entry in fake_runs.benchmarks() if entry["group"] == "startup"], number
        )
    fake_runs.quiet(tmp_path / ".benchmarks", sorted(folder.glob("*_main.json")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """`run(args)` gives the exit code, what was printed, and the errors."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main(list(args))
        code = end.value.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("package", ["scipy", "jinja2"])
def test_what_the_extra_brings_is_named_where_it_is_missing(storage, package):
    """In a process of its own: this one has imported it already."""
    code = f"import sys; sys.modules['{package}'] = None; from perf.cli import main; "
    code += "main(['compare', 'main', 'slow'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (found.returncode, found.stderr) == (
        2,
        f"error: perf needs {package}: pip install 'dynamic-batch[perf]'\n",
    )


def test_exit_codes_say_what_was_found(run, storage):
    code, out, _ = run("compare", "main", "slow")
    assert code == 1
    assert out.rstrip().splitlines()[-1].startswith("FAIL: ")
    assert run("compare", "main", "again")[0] == 4  # at 1 % of noise, five rounds can't tell 3 %
    assert run("compare", "startup", "restarted")[0] == 0
    assert run("compare", "main", "less")[0] == 3
    code, _, err = run("compare", "nope", "main")
    assert code == 3
    assert err.startswith(
        "error: no run 'nope' in '.benchmarks' (saved there: again, less, main, restarted, slow, startup)"
    )


def test_a_run_is_not_compared_with_itself(run, storage):
    code, _, err = run("compare", "main", "1")
    assert code == 2
    assert err.startswith("error: 'main' and '1' both have the session ")


@pytest.mark.parametrize("args", [["compare", "main"], ["compare", "main", "slow", "--charm"], ["charm"],
                                  ["ab", "a", "b", "--blocks", "x"]])  # fmt: skip
def test_a_wrong_command_is_a_usage_error(run, storage, args):
    assert run(*args)[0] == 2


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(run, storage, monkeypatch):
    monkeypatch.setattr("perf.ab.main.ab", None)
    for option in ("--html", "--markdown", "--csv", "--json"):
        code, _, err = run("ab", "a", "b", option, "nowhere/file")
        assert (code, err) == (
            2,
            f"error: {option} nowhere/file cannot be written: name a file in a folder that is there\n",
        )


def test_a_comparison_is_written_in_every_form(run, storage, monkeypatch):
    names = {kind: storage / f"out.{kind}" for kind in ("html", "markdown", "csv", "json")}
    options = [part for kind, path in names.items() for part in (f"--{kind}", str(path))]
    assert run("compare", "main", "slow", *options)[0] == 1
    assert json.loads(names["json"].read_text())["outcome"] == "FAIL"
    assert "FAIL" in names["markdown"].read_text().splitlines()[0]
    assert names["html"].read_text().startswith("<!DOCTYPE html>")
    assert len(names["csv"].read_text().splitlines()) > 2
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(names["markdown"]))
    before = names["markdown"].read_text()
    run("compare", "main", "slow", "--markdown", str(names["markdown"]))
    assert names["markdown"].read_text() == 2 * before


def test_a_report_judges_and_ends_well_all_the_same(run, storage):
    code, out, _ = run("report", "main", "slow")
    assert code == 0
    assert "FAIL" in out
    code, out, _ = run("report", "again", "slow", "--base", "main")
    assert code == 0
    assert "main (" in out
    code, out, _ = run("report", "main")
    assert code == 0
    assert "FAIL" not in out


def test_a_comparison_of_revisions_passes_on_what_it_was_given(run, monkeypatch, tmp_path):
    asked = {}

    def measure(base, head, args, **options):
        asked.update(base=base, head=head, args=args, **options)
        options["advance"]("processes 1 of 3")
        raise GateError("no more")

    monkeypatch.setattr("perf.ab.main.ab", measure)
    code, _, err = run(
        *("ab", "main", ".", "--budget", "1m30s", "--pairs", "2", "--min-round", "0.1"),
        *("--interleave", "blocks", "--blocks", "4", "--no-counters", "--", "perf/test_x.py", "-k", "cpu"),
    )
    assert (code, err) == (3, "processes 1 of 3\nerror: no more\n")
    assert (asked["base"], asked["head"], asked["args"]) == ("main", ".", ["perf/test_x.py", "-k", "cpu"])
    assert (asked["blocks"], asked["counters"], asked["interleave"]) == (4, False, "blocks")
    assert (asked["budget"], asked["pairs"], asked["round_s"]) == (90.0, 2, 0.1)
    run("ab", "main", ".")
    assert (asked["args"], asked["blocks"], asked["counters"]) == (["perf"], 6, True)
    assert (asked["budget"], asked["interleave"]) == (300.0, "rounds")


def test_no_bar_is_drawn_into_a_log_file_whatever_its_colours(tmp_path):
    """FORCE_COLOR, which CI services set, makes rich take any file for a terminal."""
    code = "from perf import console\nwith console.progress(2) as advance: advance('one'); advance('two [x]')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "one\ntwo [x]\n")


def test_a_fault_of_the_gate_itself_is_no_regression(run, storage, monkeypatch):
    monkeypatch.setattr("perf.gate.verdict.compare", lambda *args, **options: 1 / 0)
    code, _, err = run("compare", "main", "slow")
    assert code == 70
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize(("alarms", "found", "code"), [(0, 20, 0), (1, 19, 0), (2, 20, 1), (0, 18, 1)])
def test_the_self_test_fails_where_the_gate_cannot_be_trusted(
    run, monkeypatch, tmp_path, alarms, found, code
):
    def rate(effect, hits):
        outcomes = (Outcome.FAIL,) * hits + (Outcome.PASS,) * (20 - hits)
        return selftest.Rate(effect, 60.0, outcomes, (30.0,) * 20, failed={"tokens_per_s": hits})

    rates = (rate("0", alarms), rate("0.03", 7), rate("0.1", found))
    report = selftest.Report(3, rates, {"tokens_per_s": (None, 0.035, 0.027)})
    asked = {}

    def measure(effects, trials, **options):
        asked.update(effects=effects, trials=trials, **options)
        return report

    monkeypatch.setattr(selftest, "selftest", measure)
    got, out, _ = run(
        *("selftest", "--trials", "20", "--effects", "0, 0.03,0.1", "--budget", "2m", "--idle-budget", "1m"),
        *("--idle-trials", "40"),
        *("--json", str(tmp_path / "x.json")),
    )
    assert got == code
    assert (asked["effects"], asked["trials"], asked["args"]) == (["0", "0.03", "0.1"], 20, ())
    assert (asked["plan"].budget_s, asked["plan"].pairs, asked["idle_budget_s"]) == (120.0, 3, 60.0)
    assert asked["idle_trials"] == 40
    assert f"{found} of 20" in out
    assert "3.5%" in out
    assert json.loads((tmp_path / "x.json").read_text())["rates"][1]["regressions"] == 7


def test_effects_that_are_no_slowdowns_are_a_usage_error(run):
    code, _, err = run("selftest", "--effects", "0,much")
    assert code == 2
    assert "inject_slowdown=much must be a fraction" in err


def test_counters_and_peers_are_passed_on(run, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "perf.measure.counters", SimpleNamespace(main=lambda record: 1 if record else 0)
    )
    assert run("counters")[0] == 0
    assert run("counters", "--record")[0] == 1
    monkeypatch.setitem(
        sys.modules, "perf.servers.environments", SimpleNamespace(setup_peer=lambda name: Path("/env") / name)
    )
    code, out, _ = run("setup-peer", "openvino")
    assert (code, out) == (0, "openvino is ready in /env/openvino\n")


def test_torch_is_not_imported_where_it_is_not_used(storage):
    code = """
import sys
from perf.cli import main
report = ["report", "main", "--csv", "out.csv"]
peer = ["serve-peer", "nobody", "--model", "smollm2", "--port", "8000"]
for args in (["--help"], ["compare", "main", "slow"], report, ["store", "list"], peer):
    try:
        main(args)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, args
"""
    env = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    assert Path("out.csv").is_file()


def test_accuracy_needs_words(run, tmp_path):
    (tmp_path / "text").write_text("Some words.")
    code, _, err = run("accuracy", str(tmp_path / "text"), "--model", "random:tiny-llama")
    assert code == 2
    assert "model='random:tiny-llama' has no tokenizer: name one that has" in err


@pytest.mark.parametrize(
    "theirs", ["", "raise ValueError('two\\nlines')", "import sys; sys.exit(1)", "import nowhere"]
)
def test_another_package_named_engine_is_said_to_be_in_the_way(tmp_path, theirs):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text(theirs)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "perf", "ab", "main", "."]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    found = tmp_path / "engine" / "__init__.py"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: another package named engine, {found}, hides the one that perf needs: run it from "
        "elsewhere, or python -P -m perf\n"
    )
    if not theirs:  # the way out is one
        command.insert(1, "-P")
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: git rev-parse --show-toplevel failed")


@pytest.mark.usefixtures("few_plugins")
def test_the_plugin_says_so_too_where_it_needs_ours_and_only_there(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").touch()
    (tmp_path / "test_plain.py").write_text("def test_plain(benchmark): benchmark(int)\n")
    mark = "import pytest\n@pytest.mark.perf_gate('round_s', rel=0.2)\n"
    (tmp_path / "test_marked.py").write_text(mark + "def test_marked(benchmark): benchmark(int)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for file, options, code in (
        ("test_plain.py", (), 0), ("test_marked.py", (), 2), ("test_plain.py", ("--perf-baseline=x",), 2)
    ):  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-p", "perf.plugin", file, *options]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert ("error: another package named engine" in done.stdout + done.stderr) == bool(code)
        assert "Traceback" not in done.stdout + done.stderr
