"""`perf ab` of two revisions' servers: each started in its own tree, asked in turn, and gone afterwards."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from perf.ab.main import ab
from perf.ab.serving import BENCHMARK, IN_PROCESS, Serving
from perf.errors import Exit, GateError
from perf.gate.comparison import Outcome
from perf.gate.pytest_process import pytest_command
from tests.perf import scripted_server
from tests.perf.repos import commit

ASK = """
import json, os, pytest, time, urllib.request

@pytest.fixture
def proven():
    with open(os.environ.get("PROOFS", os.devnull), "a") as log:
        print(time.monotonic(), file=log, flush=True)
        time.sleep(0.3)
        print(time.monotonic(), file=log, flush=True)

def test_ask(proven, benchmark, request):
    url = request.config.getoption("--target") + "/v1/completions"
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    benchmark(lambda: urllib.request.urlopen(url, data=body).read())
"""
COMMAND = f"{sys.executable} serve.py {{port}}"
SERVE = "import sys, scripted_server\nscripted_server.main(sys.argv[1], {how!r})\n"


@pytest.fixture
def repo(tmp_path: Path, few_plugins: None) -> Path:
    """A repository with a server that takes 2 ms between tokens (`fast`), 20 ms (`slow`), and that ends when
    it is asked a fifth time (`broken`)."""
    folder = tmp_path / "repo"
    folder.mkdir()
    shutil.copyfile(scripted_server.__file__, folder / "scripted_server.py")
    (folder / "test_ask.py").write_text(ASK)
    for name, how in (("fast", "gap_ms=2"), ("slow", "gap_ms=20"), ("broken", "dies_after=4")):
        (folder / "serve.py").write_text(SERVE.format(how=how))
        commit(folder, name)
    return folder


def servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "serve.py" in child.cmdline()]


SERVING = Serving.of(COMMAND, None, None, 60.0)


BLOCKS = pytest.param({"interleave": "blocks", "blocks": 4}, marks=pytest.mark.slow, id="blocks")


@pytest.mark.parametrize("how", [pytest.param({"budget": 12.0, "pairs": 2}, id="rounds"), BLOCKS])
def test_a_slower_server_is_a_regression(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """And only one side at a time proves its tokens, for two servers that compute at once are slow."""
    monkeypatch.setenv("PROOFS", str(tmp_path / "proofs"))
    found = ab("fast", "slow", ["test_ask.py"], serving=SERVING, repo=repo, **how)
    assert found.exit is Exit.REGRESSION
    (verdict,) = found.verdicts
    assert verdict.outcome is Outcome.FAIL
    assert verdict.effect is not None
    assert verdict.effect > 0.5
    assert not servers()
    times = [float(line) for line in (tmp_path / "proofs").read_text().split()]
    assert len(times) >= 8
    assert times == sorted(times)
    assert all(end - begin >= 0.3 for begin, end in zip(times[::2], times[1::2], strict=True))


def test_a_server_that_ends_is_not_comparable(repo: Path) -> None:
    with pytest.raises(
        GateError, match=r"(?s)server of broken, process 1: .* ended with code 9\nout of memory"
    ) as error:
        ab("fast", "broken", ["test_ask.py"], budget=12, pairs=2, serving=SERVING, repo=repo)
    assert error.value.code is Exit.NOT_COMPARABLE
    assert not servers()


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (("a {port}", "b {port}", None), "--serve is the command of both: leave out"),
        ((None, "b {port}", None), "--serve-base and --serve-head belong together: give both"),
        ((None, None, "b {port}"), "--serve-base and --serve-head belong together: give both"),
        (("a", None, None), r"--serve='a' must have \{port\}"),
        ((None, "a {port}", "b"), r"--serve-head='b' must have \{port\}"),
    ],
)
def test_commands_that_cannot_be(commands: tuple[str | None, ...], said: str) -> None:
    with pytest.raises(GateError, match=said) as error:
        Serving.of(*commands)
    assert error.value.code is Exit.USAGE


def test_what_pytest_is_given() -> None:
    assert IN_PROCESS.args([]) == ["perf"]
    assert IN_PROCESS.args(["a"], typed=False) == ["a"]
    assert SERVING.args([]) == list(BENCHMARK)
    assert SERVING.args(["a"]) == ["a"]
    assert SERVING.args(["a"], typed=False) == list(BENCHMARK)
    with pytest.raises(GateError, match="--target is set by --serve: leave it out"):
        SERVING.args(["--target=http://h"])


def test_a_workload_in_a_file_does_not_move_pytests_root() -> None:
    command = pytest_command(["a", "--workload", "/w.jsonl", "-k", "b"], Path())
    assert command[3:7] == ["a", "--workload=/w.jsonl", "-k", "b"]
