"""The CI workflows are safe on a public repository with a GPU runner of its own; pre-commit lints them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from perf.cli import app

FOLDER = Path(__file__).parents[2] / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
GATE = "./.github/actions/perf-gate"
BY_NAME = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def parsed(path: Path) -> dict[str, Any]:
    """The workflow, with YAML 1.1's reading of `on` as true put right."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in found.items()}


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in parsed(path)["jobs"].values():
        yield from job["steps"]


def test_there_is_a_workflow_for_every_machine() -> None:
    assert [path.name for path in FILES] == ["ci.yml", "perf-comment.yml", "perf.yml"]


@BY_NAME
def test_rights_pins_and_limits(path: Path) -> None:
    workflow = parsed(path)
    writes = path.name == "perf-comment.yml"
    assert workflow["permissions"] == ({} if writes else {"contents": "read"})
    assert "pull_request_target" not in workflow["on"]
    assert ("workflow_run" in workflow["on"]) == writes
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert ("permissions" in job) == (writes or job is workflow["jobs"].get("nightly"))
    for step in steps(path):
        if "uses" in step and step["uses"] != GATE:
            assert re.fullmatch(r"actions/[\w/-]+@[0-9a-f]{40}", step["uses"])
        assert "${{" not in step.get("run", ""), "an expression in a script is code from whoever filled it"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_only_the_nightly_job_of_those_that_measure_may_write_and_only_its_git_has_the_token() -> None:
    jobs = parsed(FOLDER / "perf.yml")["jobs"] | parsed(FOLDER / "ci.yml")["jobs"]
    writing = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert writing == {"nightly": {"contents": "write"}}
    assert "github.event_name != 'pull_request'" in jobs["nightly"]["if"]
    for name, job in jobs.items():
        assert "github.token" not in str(job.get("env"))
        for step in job["steps"]:
            if "github.token" in str(step):
                assert name == "nightly"
                assert re.search(r"python -m perf (store (pull|push)|report --store)", step["run"])
            elif "run" in step:
                assert "perf store" not in step["run"]


def test_git_is_given_the_token_of_a_step_that_has_one_and_nothing_else(tmp_path: Path) -> None:
    env = parsed(FOLDER / "perf.yml")["jobs"]["nightly"]["env"]
    known = {key: str(value) for key, value in env.items() if key.startswith("GIT_CONFIG_")}
    known["GIT_CONFIG_KEY_0"] = known["GIT_CONFIG_KEY_0"].replace(
        "${{ github.server_url }}", "https://git.example"
    )
    alone = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }

    def ask(host: str, **more: str) -> subprocess.CompletedProcess[str]:
        asked = f"protocol=https\nhost={host}\n\n"
        return subprocess.run(["git", "credential", "fill"], input=asked, env={**alone, **known, **more},
                              capture_output=True, text=True)  # fmt: skip

    answer = ask("git.example", GITHUB_TOKEN="a token").stdout.splitlines()
    assert {"username=x-access-token", "password=a token"} <= set(answer)
    assert ask("git.example").returncode != 0
    assert ask("elsewhere.example", GITHUB_TOKEN="a token").returncode != 0


@BY_NAME
def test_each_action_has_one_pin_and_names_its_version(path: Path) -> None:
    pins = re.findall(
        r"uses: (actions/[\w-]+)[\w/-]*@(\S+) # (v\d+\.\d+\.\d+)$", path.read_text(encoding="utf-8"), re.M
    )
    assert len(pins) == sum(step.get("uses", GATE) != GATE for step in steps(path))
    assert len({name for name, _, _ in pins}) == len(set(pins))


def test_what_may_write_runs_nothing_of_a_pull_request() -> None:
    workflow = parsed(FOLDER / "perf-comment.yml")
    assert workflow["on"] == {"workflow_run": {"workflows": ["perf"], "types": ["completed"]}}
    assert parsed(FOLDER / "perf.yml")["name"] == "perf"
    (job,) = workflow["jobs"].values()
    assert job["permissions"] == {"actions": "read", "contents": "read", "pull-requests": "write"}
    assert job["if"].startswith("github.event.workflow_run.event == 'pull_request' && ")
    assert job["runs-on"] == "ubuntu-24.04"
    checkout, comment = job["steps"]
    assert checkout["with"]["ref"] == "${{ github.event.repository.default_branch }}"
    assert comment["run"] == "python3 .github/scripts/perf_comment.py"
    assert comment["env"].keys() == {
        "GH_TOKEN", "RUN_ID", "ARTIFACT", "HEAD_SHA", "HEAD_OWNER", "HEAD_BRANCH"
    }  # fmt: skip
    (gate,) = [step for step in steps(FOLDER / "perf.yml") if step.get("uses") == GATE]
    inputs = yaml.safe_load((FOLDER.parent / "actions/perf-gate/action.yml").read_text())["inputs"]
    name = gate["with"].get("name", inputs["name"]["default"])
    assert comment["env"]["ARTIFACT"] == f"{name}-${{{{ github.event.workflow_run.run_attempt }}}}"


def test_a_gpu_runner_sees_a_pull_request_only_at_the_commit_that_was_labelled() -> None:
    workflow = parsed(FOLDER / "perf.yml")
    assert workflow["on"]["pull_request"] == {"types": ["labeled"]}
    assert "push" not in workflow["on"]
    nightly, on_label = workflow["jobs"]["nightly"], workflow["jobs"]["pull-request"]
    assert "github.event_name != 'pull_request' && github.ref == 'refs/heads/main'" in nightly["if"]
    assert "github.event.label.name == 'perf'" in on_label["if"]
    checkout, _, gate = on_label["steps"]
    assert checkout["with"]["ref"] == "${{ github.event.pull_request.head.sha }}"
    assert checkout["with"]["fetch-depth"] == 0
    assert (gate["uses"], gate["with"]["install"]) == (GATE, "none")
    assert not {"command", "base", "head"} & gate["with"].keys(), "the labelled commit, against where it left"
    for job in (nightly, on_label):
        assert job["if"].startswith("vars.PERF_RUNNER == 'on' && ")
        assert job["runs-on"] == ["self-hosted", "linux", "gpu"]
        assert job["concurrency"]["group"].startswith("perf-")
    text = (FOLDER / "perf.yml").read_text(encoding="utf-8")
    assert "secrets." not in text


def test_every_option_in_a_workflow_is_one_that_exists(request: pytest.FixtureRequest) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    scripts = "\n".join(step.get("run", "") for path in FILES for step in steps(path)).replace("\\\n", " ")
    lines = [line.split("||")[0] for line in scripts.splitlines()]
    commands |= {f"store {name}": command for name, command in commands["store"].commands.items()}
    pattern = r"python -m perf (store \S+|\S+)(.*)"
    calls = [(m[1], m[2]) for line in lines if (m := re.search(pattern, line))]
    gated = [step["with"] for path in FILES for step in steps(path) if step.get("uses") == GATE]
    calls += [(given.get("command", "ab"), f" -- {given['args']}") for given in gated]
    assert {name for name, _ in calls} == {"ab", "compare", "report", "save", "store pull", "store push"}
    for name, arguments in calls:
        own, _, for_pytest = arguments.partition(" -- ")
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", own)) <= known
        for option in re.findall(r"--[\w-]+", for_pytest):
            request.config.getoption(option)
    measured = [line for line in lines if "python -m pytest" in line]
    assert measured
    for option in re.findall(r"--[\w-]+", " ".join(measured)):
        request.config.getoption(option.replace("-", "_")[2:])


def test_ci_runs_what_a_developer_runs() -> None:
    run, audit = [step["run"] for step in steps(FOLDER / "ci.yml") if "run" in step]
    assert run == "bash .ci/run"
    assert "pip_audit" in audit
    assert "self-hosted" not in (FOLDER / "ci.yml").read_text(encoding="utf-8")
