"""Settings of a project: where they are found, what is refused, and who takes them for defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from perf import cli, config
from perf.config import Settings, SettingsError
from perf.gate import saved_runs, tolerances
from perf.gate.comparison import Outcome
from perf.gate.verdict import compare
from tests.perf import fake_runs
from tests.perf.repos import git

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("imported", "processor_unasked")

WHOLE = """
[tool.dynamic-batch.perf]
target = "http://127.0.0.1:8000/v1"
served-model = "org/model"
api = "chat"
model = "random:tiny-llama"
dtype = "float64"
workloads = ["mixed-8", "speed/chat.jsonl"]
tolerances = {tokens_per_s = 0.05, round_s = {rel = 0.5, abs = 0.25}, ttft_p50_ms = {abs = 2}}
slo = {ttft = 200, tpot = 12.5}
budget = "1m30s"
pairs = 2
sessions = 5
storage = "runs"
args = ["speed", "-k", "a and b"]
"""
TABLE = "[tool.dynamic-batch.perf]\n"
KEYS = "target, served-model, api, model, dtype, workloads, tolerances, slo, budget, pairs, sessions, "
KEYS += "storage, args"
TIMED = "def test_time(benchmark):\n    benchmark.pedantic(lambda: None, rounds=6)\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """`project(text)` writes the settings of the folder that we stand in; gives the folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_every_key_is_read(project):
    folder = project(WHOLE)
    (folder / "speed").mkdir()
    (folder / "speed" / "chat.jsonl").touch()
    found = config.load(folder)
    assert found == Settings(
        target="http://127.0.0.1:8000/v1",
        served_model="org/model",
        api="chat",
        model="random:tiny-llama",
        dtype="float64",
        workloads=("mixed-8", "speed/chat.jsonl"),
        tolerances={
            "tokens_per_s": {"rel": 0.05},
            "round_s": {"rel": 0.5, "abs": 0.25},
            "ttft_p50_ms": {"abs": 2},
        },
        slo={"ttft": 200, "tpot": 12.5},
        budget="1m30s",
        pairs=2,
        sessions=5,
        storage="runs",
        args=("speed", "-k", "a and b"),
        source=folder / "pyproject.toml",
    )
    tolerances.check_settings(found)
    assert (found.default("slo"), found.default("workload")) == ("ttft=200,tpot=12.5", [*found.workloads])


def test_the_readmes_table_is_one_that_works_and_has_every_key(project):
    readme = (Path(config.__file__).parent / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"```toml\n(.*?)```", readme, re.S)
    tolerances.check_settings(config.load(project(table)))
    assert re.findall(r"^([\w-]+) = ", table, re.M) == KEYS.split(", ")


def test_files_count_from_the_table_wherever_one_stands(project, monkeypatch):
    folder = project(WHOLE)
    (folder / "speed").mkdir()
    (folder / "speed" / "chat.jsonl").touch()
    monkeypatch.chdir(folder / "speed")
    found = config.load(Path.cwd())
    assert (found.storage, found.workloads) == ("../runs", ("mixed-8", "chat.jsonl"))
    project(f'{TABLE}storage = "file:///tmp/runs"')
    assert config.load(Path.cwd()).storage == "file:///tmp/runs"


@pytest.mark.parametrize("git", ["folder", "file"])
def test_the_nearest_table_up_to_the_top_of_the_repository_is_the_one(project, git):
    folder = project(f"{TABLE}pairs = 7")
    inner = folder / "repository" / "package" / "tests"
    inner.mkdir(parents=True)
    assert config.load(inner).pairs == 7
    for without in ("", "[tool]", "[tool.ruff]\nline-length = 110", "[tool.dynamic-batch]"):
        (folder / "repository" / "package" / "pyproject.toml").write_text(without)
        assert config.load(inner).pairs == 7
    (folder / "repository" / "pyproject.toml").write_text(f"{TABLE}pairs = 5")
    assert config.load(inner).pairs == 5
    top = folder / "repository" / ".git"
    top.mkdir() if git == "folder" else top.touch()
    assert config.load(inner).pairs == 5
    (folder / "repository" / "pyproject.toml").unlink()
    assert config.load(inner) == Settings()


@pytest.mark.parametrize(("text", "says"), [
    (f"{TABLE}pairs = ", "cannot be read as TOML: Invalid value (at end of document)"),
    ("[tool.dynamic-batch]\nperf = 3", "tool.dynamic-batch.perf must be a table"),
    ("[tool]\ndynamic-batch = 3", "tool.dynamic-batch must be a table"),
    ("[tool.dynamic-batch.pref]", "[tool.dynamic-batch] has no pref: it has perf"),
    (f"{TABLE}pair = 3", f"[tool.dynamic-batch.perf] pair is unknown: the keys are {KEYS}"),
    (f'{TABLE}"a\\nb" = 3', f"[tool.dynamic-batch.perf] 'a\\nb' is unknown: the keys are {KEYS}"),
])  # fmt: skip
def test_what_is_no_table_of_settings_is_refused_in_a_line(project, text, says):
    with pytest.raises(SettingsError) as error:
        config.load(project(text))
    assert str(error.value) == f"pyproject.toml{' ' if 'TOML' in says else ': '}{says}"


@pytest.mark.parametrize(("setting", "must_be"), [
    *((f"{key} = {value}", "a whole number of 1 or more")
      for key in ("pairs", "sessions") for value in ("0", "-1", "true", "1.5", '"3"')),
    *((f"{key} = {value}", "text, not empty and on one line")
      for key in ("model", "dtype", "served-model") for value in ("3", '" "', '"a\\nb"', '["a"]')),
    *((f"api = {value}", '"chat" or "completions"') for value in ('"Chat"', "true", "[]")),
    *((f"budget = {value}", 'a length of time as text: "90s", "2m", "1h"')
      for value in ("120", '"soon"', '"0s"', '"200h"')),
    *((f"args = {value}", 'a list of arguments, as ["perf", "-m", "gpu"]')
      for value in ('"perf"', "[]", "[1]", '[""]')),
    *((f"workloads = {value}", 'a list of names or files, as ["mixed-32"]')
      for value in ('"mixed-8"', "[2]")),
    *((f"slo = {value}", "a table of milliseconds above 0: {ttft = 200, tpot = 50} or one of the two")
      for value in ("200", "{}", '{"ttft": 0}', '{"ttft": true}', '{"itl": 3}')),
    ("storage = 3", "a folder, or file://FOLDER"),
    ("tolerances = 0.1", "a table of metrics"),
    *((f"tolerances.tokens_per_s = {value}",
       "a fraction as 0.05, or {rel = 0.05, abs = 0.5} or one of these two, each 0 or more")
      for value in ("true", '"5%"', "-0.1", "Infinity", "NaN", "{}", '{"rel": -1}', '{"rel": 0, "max": 2}')),
    *((f"target = {value}", "the URL of a server, as http://127.0.0.1:8000, without a user or a password")
      for value in ('"127.0.0.1:8000"', '"ftp://host"', '"http://"', '"http://["', "8000")),
])  # fmt: skip
def test_a_value_of_another_kind_is_refused_with_what_it_must_be(project, setting, must_be):
    toml = setting.replace('": ', '" = ').replace("Infinity", "inf").replace("NaN", "nan")
    with pytest.raises(SettingsError) as error:
        config.load(project(TABLE + toml))
    assert str(error.value) == f"pyproject.toml: [tool.dynamic-batch.perf] {setting} must be {must_be}"


def test_no_password_and_no_flood_is_shown(project):
    with pytest.raises(SettingsError) as error:
        config.load(project(f'{TABLE}target = "http://me:secret@host"'))
    assert 'target = "http://...@host" must be' in str(error.value)
    with pytest.raises(SettingsError) as error:
        config.load(project(f"{TABLE}model = {list(range(1000))}"))
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(("limits", "why"), [
    ("tokens = 0.1", "no such gated metric; they are tokens_per_s, "),
    ("padded_tokens = 0.1", "a counter is compared exactly and takes no tolerance"),
    ("round_s = {rel = 5}", "rel=5 is a fraction and must be below 1 (0.1 is 10 %)"),
])  # fmt: skip
def test_tolerances_are_those_that_a_mark_could_have(project, limits, why):
    settings = config.load(project(f"{TABLE}tolerances = {{{limits}}}"))
    metric = limits.split(" ")[0]
    with pytest.raises(SettingsError) as error:
        tolerances.check_settings(settings)
    said = f"pyproject.toml: [tool.dynamic-batch.perf] tolerances.{metric} cannot be: {why}"
    assert str(error.value).startswith(said)


# Commands


def command(capsys, *args):
    with pytest.raises(SystemExit) as end:
        cli.main(list(args))
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def asked(monkeypatch):
    """What `perf ab`, `save` and `selftest` were told to do."""
    found = {}

    def note(name):
        def measure(*args, **options):
            found[name] = (args, options)
            raise SettingsError("no more")

        return measure

    monkeypatch.setattr("perf.ab.main.ab", note("ab"))
    monkeypatch.setattr("perf.gate.saving_sessions.save_sessions", note("save"))
    monkeypatch.setattr("perf.ab.selftest.selftest", note("selftest"))
    return found


def test_commands_take_their_defaults_from_the_table(project, asked, capsys):
    git(project(WHOLE), "init", "-q")
    assert command(capsys, "ab", "main", ".") == (2, "", "error: no more\n")
    (base, head, args), options = asked["ab"]
    assert (base, head, args) == ("main", ".", ["speed", "-k", "a and b"])
    assert (options["budget"], options["pairs"], options["blocks"]) == (90.0, 2, 6)
    command(capsys, "save", "name")
    assert asked["save"][0] == ("name", 5, ["speed", "-k", "a and b"])
    command(capsys, "selftest")  # whose arguments do not default to perf
    _, options = asked["selftest"]
    assert (options["args"], options["plan"].budget_s, options["plan"].pairs) == ((), 90.0, 2)
    for words in (("compare", "a", "b"), ("store", "push", "a")):
        code, _, err = command(capsys, *words)
        assert (code, err.split(";")[0]) == (3, "error: no run 'a': there is no storage 'runs'")


def test_options_win_over_the_table(project, asked, capsys):
    project(WHOLE)
    command(capsys, "ab", "main", ".", "--budget", "5s", "--pairs", "9", "--", "x", "-m", "gpu")
    (_, _, args), options = asked["ab"]
    assert (args, options["budget"], options["pairs"]) == (["x", "-m", "gpu"], 5.0, 9)
    command(capsys, "save", "name", "--sessions", "1", "--", "x")
    assert asked["save"][0] == ("name", 1, ["x"])
    assert "no storage 'other'" in command(capsys, "compare", "a", "b", "--storage", "other")[2]


def test_help_shows_the_default_that_holds(project, capsys):
    project(WHOLE)
    text = " ".join(command(capsys, "ab", "--help")[1].split())
    assert "[default: 1m30s]" in text
    assert "[default: 2]" in text
    assert "[default: speed, -k, a and b]" in text


@pytest.mark.parametrize("text", ["[", f"{TABLE}pairs = 0", f"{TABLE}tolerances = {{tokens = 0.1}}"])
def test_a_command_refuses_a_wrong_table_before_any_work(project, asked, capsys, text):
    project(text)
    code, out, err = command(capsys, "ab", "main", ".")
    assert (code, out, asked) == (2, "", {})
    assert err.startswith("error: pyproject.toml")
    assert err.count("\n") == 1


# Sessions of pytest


def session(pytester, settings: str, source: str, *arguments: str) -> pytest.RunResult:
    pytester.makefile(".toml", pyproject=settings)
    pytester.makepyfile(test_it=f"import pytest\nmark = pytest.mark.perf_gate\n{source}")
    own = ("-p", "perf.plugin", "-p", "no:cacheprovider", "-q")
    return pytester.runpytest_inprocess(*own, *arguments, no_reraise_ctrlc=True)


def limits(path: Path) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """The tolerances in a saved run, by test and metric."""
    return {
        name.split("::", 1)[1]: {metric: (limit.rel, limit.abs) for metric, limit in one.tolerances.items()}
        for name, one in saved_runs.load(path).benchmarks.items()
    }


def test_options_of_pytest_take_their_defaults_from_the_table(pytester):
    source = """
def test_it(pytestconfig):
    print([pytestconfig.getoption(name) for name in ("model", "dtype", "benchmark_storage")])
"""
    result = session(pytester, WHOLE, source, "-s")
    result.stdout.fnmatch_lines(["*['random:tiny-llama', 'float64', 'runs']*"])
    result = session(pytester, WHOLE, source, "-s", "--model=m", "--dtype=d", "--benchmark-storage=file://s")
    result.stdout.fnmatch_lines(["*['m', 'd', 'file://s']*"])
    added = f'{WHOLE}[tool.pytest.ini_options]\naddopts = ["--benchmark-storage", "theirs"]'
    session(pytester, added, source, "-s").stdout.fnmatch_lines(["*'theirs']*"])
    session(pytester, "", source, "-s").stdout.fnmatch_lines(["*[[]None, None, 'file://./.benchmarks']*"])


def test_a_run_is_saved_where_compare_looks_for_it(pytester, capsys):
    assert session(pytester, f'{TABLE}storage = "runs"', TIMED, "--benchmark-save=main").ret == 0
    code, _, err = command(capsys, "compare", "main", "other")
    assert code == 3
    assert "error: no run 'other' in 'runs' (saved there: main)" in err
    assert not Path(".benchmarks").exists()


def test_the_tables_tolerances_are_saved_with_the_run(pytester, monkeypatch):
    source = (
        f"{TIMED}"
        "@mark('round_s', rel=0.1)\ndef test_own(benchmark): benchmark.pedantic(int, rounds=6)\n"
        "class TestIt:\n    pytestmark = mark('round_s', abs=3.0)\n"
        "    def test_class(self, benchmark): benchmark.pedantic(int, rounds=6)\n"
    )
    assert session(pytester, WHOLE, source, "--benchmark-json=run.json").ret == 0
    found = limits(Path("run.json"))
    assert found == {
        "test_time": {"round_s": (0.5, 0.25)},
        "test_own": {"round_s": (0.1, 0.25)},
        "TestIt::test_class": {"round_s": (0.5, 3.0)},
    }
    Path("pyproject.toml").unlink()
    (entry, *_) = json.loads(Path("run.json").read_text())["benchmarks"]
    times = [1.0, 1.01, 1.0, 0.99, 1.0, 1.0]
    for factor, outcome in ((1.4, Outcome.PASS), (1.7, Outcome.FAIL)):
        pair = [{**entry, "stats": {"data": [time * by for time in times]}} for by in (1, factor)]
        base, head = (fake_runs.several(saved_runs.parse({"benchmarks": [side]}, "x.json")) for side in pair)
        (verdict,) = compare(base, head).verdicts
        assert (verdict.outcome, verdict.tolerance) == (outcome, 0.5)


def test_both_sides_of_an_ab_are_told_them(pytester):
    pytester.makeconftest(
        "from perf.ab.turn_agent import _gate\ndef pytest_runtest_setup(item): print('told', _gate(item))\n"
    )
    result = session(pytester, f"{TABLE}tolerances = {{round_s = 0.5}}", TIMED, "-s")
    result.stdout.fnmatch_lines(['*told {"round_s": {"rel": 0.5}}*'])


def test_a_table_is_for_those_that_record_its_metrics(pytester):
    """A mark without effect is refused; a table is for all tests of a project, most of which time nothing."""
    assert session(pytester, WHOLE, "def test_it(): pass\n").ret == 0
    table = f"{TABLE}tolerances = {{goodput = 0.5}}"
    assert session(pytester, table, TIMED, "--benchmark-json=run.json").ret == 0
    assert limits(Path("run.json")) == {"test_time": {}}
    marked = f"@mark('goodput', rel=0.1)\n{TIMED}"
    assert session(pytester, table, marked).ret == 2


@pytest.mark.parametrize("text", [f"{TABLE}pairs = 0", f"{TABLE}tolerances = {{tokens = 0.1}}"])
def test_a_session_refuses_a_wrong_table_before_any_test(pytester, text):
    result = session(pytester, text, "def test_never(): raise AssertionError('it ran')\n")
    output = result.stdout.str() + result.stderr.str()
    assert result.ret == 2
    assert "error: pyproject.toml: [tool.dynamic-batch.perf]" in output
    assert "it ran" not in output
    assert session(pytester, text, "", "--help").ret == 0
