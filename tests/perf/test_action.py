"""The composite action, its shell steps run as a runner runs them: exit codes, quoting, defaults, files."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from perf.cli import app
from tests.perf.repos import commit, git

ACTION = Path(__file__).parents[2] / ".github" / "actions" / "perf-gate" / "action.yml"
PARSED: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in PARSED["runs"]["steps"]}
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORD"
while [ "$#" -gt 0 ]; do
  case "$1" in
    --json | --html) echo '{}' > "$2" ;;
    --markdown) echo "## summary" >> "$2" ;;
    --) break ;;
  esac
  shift
done
exit "$CODE"
"""
HOSTILE = """a 'b' "c" $(touch owned) `touch owned` ; touch owned # * ~ ${HOME} \\ ${{ inputs.args }} \n--x"""


@dataclass(frozen=True)
class Done:
    """A step that has ended: its code, what it printed, its outputs, and what Python was called with, if it
    was."""

    code: int
    text: str
    outputs: dict[str, str]
    called: list[str] | None


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches with a commit each since `fork`; `topic` is checked out."""
    where = tmp_path_factory.mktemp("action") / "the repo"
    commit(where, "fork")
    git(where, "checkout", "-q", "-b", "topic")
    commit(where, "head")
    git(where, "checkout", "-q", "-b", "target", "fork")
    commit(where, "target-head")
    git(where, "checkout", "-q", "topic")
    return where


@pytest.fixture
def step(tmp_path, repo):
    """`step(name, code=0, **inputs)` runs a step of the action in the repository, with a Python that ends
    with `code`; `-` in the name of an input is written `_`."""
    bin_, temp = tmp_path / "bin", tmp_path / "runner temp"
    for folder in (bin_, temp):
        folder.mkdir()
    python = bin_ / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(name: str, code: int = 0, target: str = "target-head", cwd: Path = repo, **inputs: str) -> Done:
        given = {key.replace("_", "-"): value for key, value in inputs.items()}
        known = {key: about["default"] for key, about in PARSED["inputs"].items()}
        assert given.keys() <= known.keys()
        known |= given
        env = {"github.event.pull_request.base.sha": git(repo, "rev-parse", target) if target else ""}
        env |= {f"inputs.{key}": value for key, value in known.items()}
        expressions = {key: value.strip("${} ") for key, value in STEPS[name]["env"].items()}
        files = {key: tmp_path / key for key in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "RECORD")}
        for path in files.values():
            path.unlink(missing_ok=True)
        around = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        around |= {"PATH": f"{bin_}:{os.environ['PATH']}", "RUNNER_TEMP": str(temp), "CODE": str(code)}
        around |= {"GITHUB_ACTION_PATH": str(ACTION.parent)}
        around |= {key: env[expression] for key, expression in expressions.items()}
        around |= {key: str(path) for key, path in files.items()}
        script = tmp_path / "script.sh"
        script.write_text(STEPS[name]["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=cwd, env=around, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines = files["GITHUB_OUTPUT"].read_text().splitlines() if files["GITHUB_OUTPUT"].exists() else []
        outputs = dict(line.split("=", 1) for line in lines)
        record = files["RECORD"]
        called = record.read_text().split("\0")[:-1] if record.exists() else None
        assert not [*tmp_path.rglob("owned"), *repo.rglob("owned")]
        return Done(done.returncode, done.stdout, outputs, called)

    return run


def test_its_steps_are_safe_and_whole() -> None:
    assert [*STEPS] == ["Install", "Gate", "Report"]
    used = set()
    for step_ in STEPS.values():
        assert "${{" not in step_.get("run", ""), "an expression in a script is code from whoever filled it"
        if "run" in step_:
            assert step_["shell"] == "bash"
            known = re.compile(r"\$\{\{ (inputs\.[\w-]+|github\.event\.pull_request\.base\.sha) \}\}")
            assert all(known.fullmatch(value) for value in step_["env"].values())
        used |= set(re.findall(r"inputs\.([\w-]+)", str(step_)))
    assert used == PARSED["inputs"].keys()
    report = STEPS["Report"]
    assert re.fullmatch(r"actions/upload-artifact@[0-9a-f]{40}", report["uses"])
    assert "!cancelled()" in report["if"]
    pin = re.search(r"uses: (actions/upload-artifact@\S+ # v\S+)$", ACTION.read_text(), re.M)
    workflow = (ACTION.parents[2] / "workflows" / "perf.yml").read_text(encoding="utf-8")
    assert pin
    assert pin[1] in workflow, "one pin of an action everywhere"


@pytest.mark.parametrize(("code", "strict", "ends", "verdict", "level"), [
    (0, "false", 0, "pass", None),
    (1, "false", 1, "regression", "error"),
    (2, "false", 2, "usage", "error"),
    (3, "false", 3, "not-comparable", "error"),
    (4, "false", 0, "inconclusive", "warning"),
    (4, "true", 4, "inconclusive", "error"),
    (130, "false", 130, "interrupted", "error"),
    (70, "false", 70, "broken", "error"),
])  # fmt: skip
def test_what_each_exit_code_becomes(step, code, strict, ends, verdict, level):
    done = step("Gate", code, fail_on_inconclusive=strict)
    assert (done.code, done.outputs["verdict"]) == (ends, verdict), done.text
    said = re.findall(r"^::(\w+) title=performance::\S", done.text, re.M)
    assert said == ([level] if level else [])
    folder = Path(done.outputs["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "summary.md", "verdict.json"]
    assert (folder / "summary.md").read_text() == "## summary\n"


def test_by_default_it_measures_what_is_checked_out_against_where_it_left_the_target(step, tmp_path, repo):
    done = step("Gate")
    folder, summary = done.outputs["folder"], str(tmp_path / "GITHUB_STEP_SUMMARY")
    assert done.called is not None
    assert done.called == [
        "-P", "-m", "perf", "ab", "--markdown", summary, "--json", f"{folder}/verdict.json",
        "--html", f"{folder}/report.html", "--", git(repo, "rev-parse", "fork"), "HEAD",
    ]  # fmt: skip
    ended = step("Gate", head=".", args="speed -k fast", budget="2m")
    assert ended.called is not None
    assert ended.called[4] == "--budget=2m"
    assert ended.called[-6:] == ["--", git(repo, "rev-parse", "fork"), ".", "speed", "-k", "fast"]
    for call in (done.called, ended.called):  # the real commands know these options
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        parsed = commands["ab"].make_context("ab", call[4:])
        assert (parsed.params["base"], parsed.params["head"]) == tuple(call[call.index("--") + 1 :][:2])


def test_it_compares_saved_runs(step):
    done = step("Gate", command="compare", base="main", head="0002_it's", target="")
    assert done.called is not None
    assert done.called[3] == "compare"
    assert done.called[-3:] == ["--", "main", "0002_it's"]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands["compare"].make_context("compare", done.called[4:]).params["head"] == "0002_it's"


def test_servers_are_named_by_commands(step):
    both = step("Gate", serve="vllm serve 'a b' --port {port}").called
    assert both is not None
    assert both[4] == "--serve=vllm serve 'a b' --port {port}"
    each = step("Gate", serve_base="old --port {port}", serve_head="new --port {port}").called
    assert each is not None
    assert each[4:6] == ["--serve-base=old --port {port}", "--serve-head=new --port {port}"]


def test_no_input_is_code(step):
    """`step` asserts that nothing was run; here, that each came through as it is."""
    done = step("Gate", base=HOSTILE, head=HOSTILE, budget=HOSTILE, serve=HOSTILE, serve_base=HOSTILE)
    assert done.called is not None
    assert done.called[4:7] == [f"--budget={HOSTILE}", f"--serve={HOSTILE}", f"--serve-base={HOSTILE}"]
    assert done.called[-3:] == ["--", HOSTILE, HOSTILE]
    assert step("Gate", python=HOSTILE).outputs["verdict"] == "broken"
    assert step("Install", python=HOSTILE).code
    for name in ("command", "fail_on_inconclusive"):
        done = step("Gate", **{name: HOSTILE})
        assert (done.code, done.called, done.outputs) == (2, None, {"verdict": "usage"})


@pytest.mark.parametrize(("args", "words"), [
    ("", []), (" \n ", []), ("perf", ["perf"]), (" a  b\n c\n", ["a", "b", "c"]),
    ("-k 'a and b' --x=\"c  d\" e\\ f", ["-k", "a and b", "--x=c  d", "e f"]),
    ("$(touch owned) `touch owned` ;", ["$(touch", "owned)", "`touch", "owned`", ";"]),
    ("'$(touch owned)' \"$HOME\" * ~", ["$(touch owned)", "$HOME", "*", "~"]),
    ("'' x", ["", "x"]), ("-- -n %s\\\\0 é", ["--", "-n", "%s\\0", "é"]),
])  # fmt: skip
def test_args_are_split_like_a_shells_and_not_expanded(step, args, words):
    called = step("Gate", args=args, base="main").called
    assert called is not None
    assert called[called.index("--") + 1 :] == ["main", "HEAD", *words]
    installed = step("Install", install=args).called
    assert installed is not None
    assert words == [] or installed == ["-m", "pip", "install", "--quiet", *words]


@pytest.mark.parametrize(("inputs", "says"), [
    (dict(command="bisect"), "command must be ab or compare"),
    (dict(fail_on_inconclusive="yes"), "must be true or false"),
    (dict(args="-k 'a"), "has a quote without its counterpart"),
    (dict(target=""), "base has no default outside a pull request"),
    (dict(head="nowhere"), "check out with fetch-depth: 0"),
    (dict(command="compare", base="main"), "name two saved runs"),
    (dict(command="compare", base="main", head="other", args="x"), "compare measures nothing"),
    (dict(command="compare", base="main", head="other", budget="1m"), "compare measures nothing"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_measured(step, inputs, says):
    done = step("Gate", **inputs)
    assert (done.code, done.called, done.outputs) == (2, None, {"verdict": "usage"})
    assert re.search(rf"^::error title=performance::.*{says}", done.text, re.M), done.text


def test_a_shallow_checkout_is_told_what_to_do(step, tmp_path, repo):
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth=1", "--branch=topic", f"file://{repo}", str(shallow))
    done = step("Gate", cwd=shallow)
    assert (done.code, done.called) == (2, None)
    assert "check out with fetch-depth: 0" in done.text


def test_it_installs_this_project_unless_told_otherwise(step):
    assert step("Install").called == ["-m", "pip", "install", "--quiet", f"{ACTION.parents[3]}[perf]"]
    assert step("Install", install="none").called is None
    assert step("Install", code=1).code == 1
    done = step("Install", install="-c constraints.txt -e '.[gpu,test]'")
    assert done.called == ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[gpu,test]"]


def test_the_readmes_step_is_one_that_works():
    readme = (ACTION.parents[3] / "perf" / "README.md").read_text(encoding="utf-8")
    (snippet,) = [found for found in re.findall(r"```yaml\n(.*?)```", readme, re.S) if "perf-gate" in found]
    checkout, gate = yaml.safe_load(snippet)
    assert len(snippet.splitlines()) == 5
    assert (checkout["with"]["fetch-depth"], checkout["with"]["persist-credentials"]) == (0, False)
    assert gate["uses"].split("@")[0].endswith("/.github/actions/perf-gate")
    assert gate["with"].keys() <= PARSED["inputs"].keys()
