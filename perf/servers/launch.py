"""A server of the user's that is started for a measurement and stopped after it, with all that it started."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from perf.errors import Exit, GateError, uninterrupted
from perf.servers.ready import TargetError, wait_until_ready
from perf.servers.target import Target

PORT = "{port}"  # in a command: where it must listen
READY_S = 600.0
STOP_S = 10.0  # from TERM to KILL
LOG_LINES, LOG_CHARACTERS = 15, 2000  # of its end that an error shows
HOST = "127.0.0.1"


def check_command(option: str, command: str) -> list[str]:
    """Return a server's command as a list.

    Raises:
        GateError: with code 2, if it cannot be read or says nowhere what port to listen at.
    """
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise GateError(f"{option}={command!r} cannot be read as a command: {error}", Exit.USAGE) from None
    if not any(PORT in part for part in parts):
        raise GateError(
            f"{option}={command!r} must have {PORT} where the server is told its port", Exit.USAGE
        )
    return parts


@contextmanager
def running(
    name: str, command: str, cwd: Path, env: Mapping[str, str], log: Path, ready_s: float = READY_S
) -> Iterator[Target]:
    """Start a server on a free port of this machine, wait until it is ready, and stop it in the end.

    Args:
        name: for messages.
        command: with `{port}` in it; run without a shell, in a process group of its own.
        cwd, env: where and with what it runs.
        log: receives what it prints.

    Raises:
        GateError: if it cannot be started, ends, or is not ready in time: with the end of its log.
    """
    port = free_port()
    parts = [part.replace(PORT, str(port)) for part in check_command(name, command)]
    server = _Server(name, parts, log)
    try:
        server.start(cwd, env)
        target = Target.parse(f"http://{HOST}:{port}")
        try:
            wait_until_ready(target, ready_s, server.check)
        except TargetError as error:
            raise server.failed(str(error)) from None
        try:
            yield target
        except GateError:
            server.check()  # its end may be why
            raise
        server.check()
    finally:
        with uninterrupted():
            server.stop()


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens at."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])


class _Server:
    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.command, self.log = name, command, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, cwd: Path, env: Mapping[str, str]) -> None:
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    self.command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise GateError(f"{self.name}: cannot be started: {error}") from None

    def check(self) -> None:
        """Raise GateError if it has ended."""
        code = self.process.poll() if self.process else None
        if code is not None:
            raise self.failed(f"ended with {f'code {code}' if code >= 0 else f'signal {-code}'}")

    def failed(self, why: str) -> GateError:
        """Return the error, with the end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
        lines = "\n".join(text.rstrip().splitlines()[-LOG_LINES:]) or "(it printed nothing)"
        return GateError(f"{self.name}: {shlex.join(self.command)} {why}\n{lines}")

    def stop(self) -> None:
        """End its process group: TERM, and KILL for what is left after a while."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while time.monotonic() < until and self._is_alive():
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _is_alive(self) -> bool:
        """Return whether anything of its group is left; its own end is noted on the way."""
        assert self.process is not None
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
