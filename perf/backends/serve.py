"""This project's own server as a backend: a process that `python -m engine serve` starts, asked over HTTP."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shlex import join

from perf.backends import Setup, Unavailable
from perf.backends.http.backend import Http, HttpSession
from perf.servers.launch import running

NEEDS = ("aiohttp", "starlette", "uvicorn", "prometheus_client")


class ServeSession(HttpSession):
    """A server that lives as long as the session."""

    in_process = False

    def __init__(self, setup: Setup) -> None:
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
            words = [f"{word}" for option in options.items() for word in option]
            words.append("--no-prefix-caching")  # nothing of one round may speed up the next
            command = join([sys.executable, "-m", "engine", "serve", *words])
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

    def missing(self, device: str) -> str | None:
        """Return what it lacks: the server and the client, which are extras."""
        there = all(map(find_spec, NEEDS))
        return None if there else "pip install 'dynamic-batch[serve,http]'"

    def open(self, setup: Setup) -> HttpSession:
        """Start a server. Raises Unavailable for a model that a process cannot load by its name."""
        if setup.loaded.spec.startswith("random:") and setup.seed:
            raise Unavailable(f"{self.name}: weights of seed {setup.seed} are in this process alone")
        return ServeSession(setup)
