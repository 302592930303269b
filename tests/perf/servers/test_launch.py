"""Servers that are started and stopped, and those that will not."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from perf.errors import Exit, GateError
from perf.servers import launch, ready
from perf.servers.launch import check_command, running
from perf.servers.ready import TargetError, wait_until_ready
from perf.servers.target import Target
from tests.perf import scripted_server
from tests.perf.scripted_server import Script

SERVER = f"{sys.executable} {scripted_server.__file__} {{port}}"


def run(tmp_path: Path, command: str, **how: float) -> Target:
    """Start a server and stop it; gives where it was."""
    with running("server", command, tmp_path, os.environ, tmp_path / "log", **how) as target:
        wait_until_ready(target, 1)
        return target


def test_a_server_runs_as_long_as_it_is_wanted(tmp_path: Path) -> None:
    target = run(tmp_path, SERVER)
    with pytest.raises(TargetError, match="does not answer"):
        wait_until_ready(target, 1)


def test_what_a_server_started_is_stopped_with_it(tmp_path: Path) -> None:
    """Its child ignores TERM, so only KILL of the group ends it."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "code = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code])\n"
        "open('child', 'w').write(str(child.pid))\n"
        f"import runpy; sys.argv = ['server', sys.argv[1]]; runpy.run_path({scripted_server.__file__!r}, "
        "run_name='__main__')\n"
    )
    before = launch.STOP_S
    launch.STOP_S = 0.2
    try:
        run(tmp_path, f"{sys.executable} {script} {{port}}")
    finally:
        launch.STOP_S = before
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 10
    while time.monotonic() < until and _runs(child):
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # whoever inherited it has not looked yet


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('no memory'); exit(3)", "ended with code 3\nno memory"),
        ("import os; os.kill(os.getpid(), 9)", r"ended with signal 9\n\(it printed nothing\)"),
    ],
)
def test_a_server_that_ends_before_it_is_ready(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(GateError, match=said) as error:
        run(tmp_path, f'{sys.executable} -c "{code}" {{port}}')
    assert error.value.code is Exit.NOT_COMPARABLE


def test_a_server_that_is_not_ready_in_time(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"does not answer: .* s after it was started"):
        run(tmp_path, f'{sys.executable} -c "import time; time.sleep(60)" {{port}}', ready_s=0.3)


def test_a_server_that_ends_while_it_is_measured(tmp_path: Path) -> None:
    with (
        pytest.raises(GateError, match="ended with signal 9"),
        running("server", SERVER, tmp_path, os.environ, tmp_path / "log"),
    ):
        _fail_after_killing_the_server()


def _fail_after_killing_the_server() -> None:
    for child in psutil.Process().children():
        if scripted_server.__file__ in child.cmdline():
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # gone, and not yet looked at
    raise GateError("pytest failed")


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"server: cannot be started: .*No such file"):
        run(tmp_path, "no-such-program {port}")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("vllm serve m", r"must have \{port\} where the server is told its port"),
        ("vllm 'serve {port}", "cannot be read as a command"),
    ],
)
def test_a_command_that_cannot_be_one(command: str, said: str) -> None:
    with pytest.raises(GateError, match=said) as error:
        check_command("--serve", command)
    assert error.value.code is Exit.USAGE


def test_a_loading_server_is_waited_for() -> None:
    script = Script(loading=2)
    with scripted_server.scripted_server(script) as url:
        wait_until_ready(Target.parse(url), 10)
    assert script.loading < 0


def test_a_server_that_loads_for_too_long() -> None:
    with (
        scripted_server.scripted_server(Script(loading=10**6)) as url,
        pytest.raises(TargetError, match=r"says that it is not ready \(HTTP 503\), 0 s after"),
    ):
        wait_until_ready(Target.parse(url), 0.1)


def test_a_server_without_health_is_asked_for_its_models() -> None:
    with scripted_server.scripted_server(Script(health=False)) as url:
        wait_until_ready(Target.parse(url), 1)


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with scripted_server.scripted_server(Script()) as url:
        assert ready._is_ready(Target.parse(url))
