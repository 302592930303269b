"""The plugin's options for servers, and the loads that a server is measured under.

A part of perf/plugin.py. It imports no HTTP client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pytest

from perf.option_types import integers, rates, slo, target

WORKLOAD = "mixed-32"
CONCURRENCY = [32]
FROM_SETTINGS = ("target", "served_model", "api", "workload", "slo")  # by dest, as perf/config.py has them
NO_TARGET = "needs a server: --target http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Load:
    """A workload, and how it comes: so many requests at once at most, or so many a second by chance."""

    workload: str
    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        how = f"c{self.concurrency}" if self.rate is None else f"r{self.rate:g}"
        return f"{PurePath(self.workload).name}-{how}"


def add_options(add: Callable[..., Any]) -> None:
    """Add them to the plugin's."""
    add("--target", type=target, metavar="URL", help="a server that speaks OpenAI's API, to be measured")
    add("--served-model", metavar="ID", help="its model's name (default: the first that it names)")
    add("--api", choices=("chat", "completions"), help="how it is asked (default: what fits the workload)")
    add("--workload", action="append", metavar="NAME|FILE", help=f"repeatable (default: {WORKLOAD})")
    add("--concurrency", type=integers, metavar="N,N", help="requests at once, at most (default: 32)")
    add("--rates", type=rates, metavar="R,R", help="requests a second that come by chance, instead")
    add("--slo", type=slo, metavar="ttft=MS,tpot=MS", help="limits of goodput (default: ttft=200,tpot=50)")


def loads(config: pytest.Config) -> list[Load]:
    """Return every load that the options name."""
    workloads = config.getoption("--workload") or [WORKLOAD]
    if offered := config.getoption("--rates"):
        return [Load(workload, rate=rate) for workload in workloads for rate in offered]
    sizes = config.getoption("--concurrency") or CONCURRENCY
    return [Load(workload, concurrency=size) for workload in workloads for size in sizes]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test that has `server_load` each of the loads, on the client's CPU; skip it without a server."""
    marks = () if metafunc.config.getoption("--target") else (pytest.mark.skip(reason=NO_TARGET),)
    rows = [pytest.param("cpu", load, id=load.label, marks=marks) for load in loads(metafunc.config)]
    metafunc.parametrize(["device", "server_load"], rows)


@pytest.fixture(scope="session")
def server_target(request: pytest.FixtureRequest) -> Any:
    """The server of `--target`, `--served-model` and `--api`."""
    from perf.servers.target import Target

    names = ("target", "served-model", "api")
    return Target.parse(*(request.config.getoption(f"--{name}") for name in names))
