"""The servers of an A/B: each revision's own, started for its measurement and stopped after it.

A server is started in its revision's tree, on a free port, and asked when it is ready; pytest is told where
it is by `--target`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from perf.ab.import_proof import environment
from perf.errors import Exit, GateError
from perf.servers.launch import READY_S, check_command, running

BENCHMARK = ("--pyargs", "perf.benchmarks.test_server", "--noconftest")  # it needs none of a repository


@dataclass(frozen=True)
class Serving:
    """Commands of base's and head's server; without any, each revision measures in its own process."""

    commands: tuple[str, str] | None = None
    ready_s: float = READY_S

    @classmethod
    def of(cls, both: str | None, base: str | None, head: str | None, ready_s: float = READY_S) -> Serving:
        """Return those of `--serve`, or of `--serve-base` and `--serve-head`.

        Raises:
            GateError: with code 2, for a command that cannot be run, or one that lacks its counterpart.
        """
        if both is not None and (base is not None or head is not None):
            raise GateError(
                "--serve is the command of both: leave out --serve-base and --serve-head", Exit.USAGE
            )
        base, head = (both, both) if both is not None else (base, head)
        if base is None and head is None:
            return cls(None, ready_s)
        if base is None or head is None:
            raise GateError(
                "--serve-base and --serve-head belong together: give both, or --serve", Exit.USAGE
            )
        for option, command in (("--serve-base", base), ("--serve-head", head)):
            check_command(option if both is None else "--serve", command)
        return cls((base, head), ready_s)

    def args(self, given: Sequence[str], typed: bool = True) -> list[str]:
        """Return pytest's arguments: what is given, else the benchmark of a server, else all of perf.

        Args:
            typed: whether they were given with this command; those of a project's settings name benchmarks
                of its own process, and are left out where a server is measured.

        Raises:
            GateError: with code 2, if they name a server besides.
        """
        if self.commands is None:
            return list(given or ("perf",))
        if any(arg.split("=")[0] == "--target" for arg in given):
            raise GateError("--target is set by --serve: leave it out", Exit.USAGE)
        return list(given if given and typed else BENCHMARK)

    @contextmanager
    def at(self, side: int, name: str, tree: Path, top: Path, log: Path) -> Iterator[list[str]]:
        """Have a side's server run, and give what pytest is told of it; nothing where there is none.

        Args:
            side: 0 for base, 1 for head.
            name: of the process or block that it serves, for messages.
            tree: where it runs.
            top: of the checkout.
            log: a file for what it prints.

        Raises:
            GateError: as `running` does.
        """
        if self.commands is None:
            yield []
            return
        env = environment(tree, top)
        with running(f"server of {name}", self.commands[side], tree, env, log, self.ready_s) as target:
            yield [f"--target={target.url}"]


IN_PROCESS = Serving()
