"""Many machines, by Ray: one engine an actor, and nothing of ours that schedules across them.

`batch` answers a file by Ray Data, `serve` answers HTTP by Ray Serve. Extra `ray`. `$RAY_ADDRESS` names a
cluster, on whose machines this package must be installed; without one Ray begins its own on this machine, and
ends with the command.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from engine.config import EngineConfig
from engine.errors import InputError

ADDRESS = "RAY_ADDRESS"  # in the environment
CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """replicas: engines. gpus: of each, which may be a fraction; 0 on a CPU. cpus: of each; None: as fits."""

    replicas: int = 1
    gpus: float = 0.0
    cpus: float | None = None


def is_own() -> bool:
    """Return whether a cluster would be begun here, since the environment names none."""
    return os.environ.get(ADDRESS, "") in ("", "local")


def config_of_each(config: EngineConfig, cluster: Cluster) -> EngineConfig:
    """Return the config of each engine: on a CPU without GPUs, and with its part of memory that it shares.

    Raises:
        InputError: for a GPU that is asked for by name and given to none.
    """
    if not cluster.gpus:  # Ray hides none from an actor that asked for none
        if config.device.startswith("cuda"):
            raise InputError(f"device={config.device!r} with gpus=0: say how many GPUs each replica has")
        config = replace(config, device="cpu")
    if not isinstance(config.kv_memory, float):
        return config
    share = min(1.0, cluster.gpus) if cluster.gpus else 1 / (cluster.replicas if is_own() else 1)
    return replace(config, kv_memory=config.kv_memory * share)


@contextmanager
def connected() -> Iterator[None]:
    """A connection to the cluster, which ends with it if it was begun here; none is made where there is one.

    What actors print is in Ray's logs.

    Raises:
        InputError: if nothing answers at `$RAY_ADDRESS`.
    """
    if ray.is_initialized():
        yield
        return
    said: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if is_own():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports to its makers
        with _sigterm_held():
            ray.init(address="local", include_dashboard=False, **said)
    else:
        address = os.environ[ADDRESS]
        try:
            _check_listens(address)
            ray.init(address=address, **said)
        except (OSError, ValueError) as error:
            first = (str(error) or repr(error)).splitlines()[0]
            raise InputError(f"${ADDRESS}={address!r} leads to no cluster: {first}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise OSError where nobody listens at an address, of which Ray is sure after minutes only."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Receive no SIGTERM meanwhile; processes that are begun never do: Ray's end when this one ends them.

    Whoever ends a process group sends SIGTERM to all of it, and Ray would be gone before the last request.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
