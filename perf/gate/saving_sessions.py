"""Several sessions of pytest saved under one name: fresh processes, one after the other, of this checkout.

Only whole sessions are saved. What a session that failed had saved is deleted again, and one that is
interrupted is killed before it can save anything: of a baseline it would be an incomplete part.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from perf.errors import Exit, GateError, sigterm_interrupts
from perf.gate.pytest_process import check_args, failure, pytest_command
from perf.gate.storage import check_name

SAVED = re.compile(r"Saved benchmark data in: (.+?\.json)(?:\x1b\[0m)?$", re.MULTILINE)  # pytest-benchmark's


def save_sessions(
    name: str, sessions: int, args: Sequence[str], *, advance: Callable[[str], object] = lambda _: None
) -> Iterator[int]:
    """Run pytest so many times in the current directory, and yield how many are saved after each.

    Args:
        name: what all of them are saved by.
        args: what pytest is given in each.
        advance: called with a line about what comes next, once before each.

    Raises:
        GateError: for a name or a number that cannot be, options that clash with ours, or a session that
            fails or measures nothing: with the end of its output, and how many are saved.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the session is ended.
    """
    check_name(name)
    if sessions < 1:
        raise GateError(f"sessions={sessions} must be 1 or more", Exit.USAGE)
    check_args(args, "session")
    for number in range(1, sessions + 1):
        advance(f"session {number} of {sessions}: {name}")
        with tempfile.TemporaryDirectory(prefix="perf-save-") as folder, sigterm_interrupts():
            proof = Path(folder) / "session.json"  # not written, or empty, where nothing was measured
            own = (f"--benchmark-save={name}", "--benchmark-save-data", f"--benchmark-json={proof}")
            command = pytest_command(args, Path.cwd(), *own)
            code, output = _run(command)
            whole = code == 0 and proof.is_file() and proof.stat().st_size
        if not whole:
            error = failure(f"session {number} of {sessions}", command, code, output)
            so_far = f"saved as {name!r}: {number - 1} of {sessions} sessions{_undo(output)}"
            raise GateError(f"{error}\n{so_far}", error.code)
        yield number


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; gives its exit code, and all that it printed.

    It is in a process group of its own, which Ctrl-C reaches by way of us alone.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


def _undo(output: str) -> str:
    """Delete what a session that failed says it saved, and return the words for it."""
    saved = [Path(path) for path in SAVED.findall(output)]
    for path in saved:
        path.unlink(missing_ok=True)
    return "".join(f"; {path.name}, which this one saved, was not whole and is deleted" for path in saved)
