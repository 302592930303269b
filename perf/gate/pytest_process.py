"""Pytest in a process of its own: the command line that measures, and options that would keep it from it.

Shared by all that run pytest for a measurement. It starts nothing and reads no result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from perf.errors import Exit, GateError

OWN_OPTIONS = {"--benchmark-json", "--benchmark-save", "--benchmark-autosave"}
OWN_OPTIONS |= {"--perf-baseline", "--perf-inject-slowdown"}
NO_TIMINGS = ("--benchmark-disable", "--benchmark-skip", "--numprocesses", "--dist", "-n")
FILES = ("--workload", "--perf-baseline")  # options whose value may be a file
TAIL = 30  # lines of a failed session's output that are shown
PYTEST_USAGE = 4


def check_args(args: Sequence[str], unit: str = "block") -> None:
    """Raise GateError, code 2, for pytest arguments that take away the measuring, or that each `unit` has."""
    for arg in args:
        option = arg.split("=")[0]
        if option in OWN_OPTIONS:
            raise GateError(f"{option} is set for each {unit} by itself: leave it out", Exit.USAGE)
        if option in NO_TIMINGS or (arg.startswith("-n") and arg[2:].isdigit()):
            raise GateError(f"{arg} turns benchmarks off, so that nothing is timed: leave it out", Exit.USAGE)


def pytest_command(args: Sequence[str], tree: Path, *own: str) -> list[str]:
    """The command that runs pytest in `tree` such that it measures: our plugin loaded, xdist off.

    Args:
        args: what the user gives pytest.
        own: options of ours.
    """
    command = [sys.executable, "-m", "pytest", *_joined(args), "-q", "-p", "no:cacheprovider", *own]
    unwanted = any(arg.endswith("no:perf.plugin") for arg in args)
    if not unwanted and (not (tree / "perf").is_dir() or (tree / "perf" / "plugin.py").is_file()):
        command += ["-p", "perf.plugin"]  # or nobody would look at a tolerance mark
    if has_plugin("xdist", args):
        command.append("-n0")  # outranks the project's own addopts, and those in PYTEST_ADDOPTS
    return command


def _joined(args: Sequence[str]) -> list[str]:
    """Return the arguments with `--workload FILE` as `--workload=FILE`: pytest takes every argument that is a
    path for one of its tests', and would look for its root above both, so that test ids would have the
    tree's own name in them."""
    found: list[str] = []
    for arg in args:
        if found and found[-1] in FILES:
            found[-1] = f"{found[-1]}={arg}"
        else:
            found.append(arg)
    return found


def failure(name: str, command: Sequence[str], code: int, output: str, what: str = "") -> GateError:
    """The error of a pytest that failed, or `what` else it did, or with a `code` of 0 that it measured
    nothing; with its output's end."""
    what = what or (f"pytest ended with code {code}" if code else "pytest measured nothing")
    tail = "\n".join(output.splitlines()[-TAIL:])
    end = Exit.USAGE if code == PYTEST_USAGE else Exit.NOT_COMPARABLE
    return GateError(f"{name}: {what} ({' '.join(command[2:])})\n{tail}", end)


def has_plugin(name: str, args: Sequence[str]) -> bool:
    """Return whether a pytest with these arguments loads an installed plugin by itself."""
    given = [*args, *os.environ.get("PYTEST_ADDOPTS", "").split()]
    refused = any(arg.endswith(f"no:{name}") or arg == "--disable-plugin-autoload" for arg in given)
    if refused or os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        return False
    return bool(entry_points(group="pytest11", name=name))
