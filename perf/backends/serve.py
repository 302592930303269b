"""This project's own server as a backend: a process that `python -m engine serve` starts, asked over HTTP.

`serve` is one engine; `ray` is one behind Ray Serve, and `ray-2` two, of a processor each.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shlex import join

from perf.backends import Setup, Unavailable
from perf.backends.http.backend import Http, HttpSession
from perf.servers.launch import running


class ServeSession(HttpSession):
    """A server that lives as long as the session; `words` are options of its command."""

    in_process = False

    def __init__(self, setup: Setup, words: Sequence[str]) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-serve-")))
            options = {
                "--model": setup.loaded.spec,
                "--device": setup.device,
                "--dtype": setup.dtype,
                "--seed": setup.seed,
                "--max-batch-size": setup.max_batch_size,
                "--port": "{port}",
            }
            said = [f"{word}" for option in options.items() for word in option]
            said.append("--no-prefix-caching")  # nothing of one round may speed up the next
            command = join([sys.executable, "-m", "engine", "serve", *said, *words])
            server = running("serve", command, Path.cwd(), os.environ, folder / "log")
            target = stack.enter_context(server)
            super().__init__(replace(setup, options={"target": target}))
            self._process = stack.pop_all()

    def close(self) -> None:
        """Close the connections, then the server."""
        super().close()
        if hasattr(self, "_process"):
            self._process.close()


class Serve(Http):
    """`python -m engine serve`, on this machine."""

    name = policy = "serve"
    exact = True  # its tokens are the engine's
    remote = False
    needs: tuple[str, ...] = ("aiohttp", "starlette", "uvicorn", "prometheus_client")
    extras = "serve,http"
    words: tuple[str, ...] = ()  # options of its command

    def missing(self, device: str) -> str | None:
        """Return what it lacks: the server and the client, which are extras."""
        there = all(map(find_spec, self.needs))
        return None if there else f"pip install 'dynamic-batch[{self.extras}]'"

    def open(self, setup: Setup) -> HttpSession:
        """Start a server. Raises Unavailable for a model that a process cannot load by its name."""
        if setup.loaded.spec.startswith("random:") and setup.seed:
            raise Unavailable(f"{self.name}: weights of seed {setup.seed} are in this process alone")
        return ServeSession(setup, self.words)


class OnRay(Serve):
    """`python -m engine serve --ray`, on a cluster of its own on this machine: one replica."""

    name = policy = "ray"
    needs = (*Serve.needs, "ray")
    extras = "ray,http"
    words: tuple[str, ...] = ("--ray", "--cpus", "1")

    def open(self, setup: Setup) -> HttpSession:
        """Start a cluster and a server. Raises Unavailable as `serve` does, and for a `$RAY_ADDRESS`."""
        if os.environ.get("RAY_ADDRESS"):
            raise Unavailable(f"{self.name}: $RAY_ADDRESS names a cluster, and this measures one of its own")
        return super().open(setup)


class TwoOnRay(OnRay):
    """The same with two replicas."""

    name = policy = "ray-2"
    words = (*OnRay.words, "--replicas", "2")
