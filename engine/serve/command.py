"""`python -m engine serve`: the process that serves a model, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InputError
from engine.output import ERRORS
from engine.serve.app import Limits, Server
from engine.serve.guard import LOCAL, Guard

KEY = "ENGINE_API_KEY"  # in the environment
KEEP_ALIVE_S = 75  # clients that come back sooner find their connection
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of the command.

    config: of the engine. max_queue: requests that may wait beyond those that run. drain_s: how long requests
    may go on once the server is told to end.
    """

    model: str
    config: EngineConfig
    host: str
    port: int
    key_file: Path | None
    without_key: bool
    served_name: str | None
    max_queue: int
    timeout_s: float
    drain_s: float

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_name or self.model

    @property
    def limits(self) -> Limits:
        """Limits of one engine's requests."""
        return Limits(self.config.max_batch_size + self.max_queue, self.timeout_s)

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names that requests may call the server by; None: any."""
        return LOCAL if self.host in LOOPBACK else None


def run(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C; then take nothing new, and let what is on its way end.

    Raises:
        InputError: for a key that cannot be read, a host that needs one, a port that is taken, or a model
            that cannot be loaded.
    """
    key = read_key(options)
    listening = listen(options.host, options.port)
    server = Server(options.name, options.limits)
    guard = Guard(server.app, key, options.hosts)
    config = uvicorn.Config(
        guard, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(options.drain_s)), server_header=False, backlog=BACKLOG,
    )  # fmt: skip
    log_requests()
    process = Process(config, server, options)
    # Uvicorn raises the signal that ended it once more, so that the process would end by it.
    before = [(number, signal.signal(number, _heard)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        process.run(sockets=[listening])
    finally:
        for number, handler in before:
            signal.signal(number, handler)
        server.close()
    if process.failed is not None:
        raise process.failed
    if process.is_loading:
        # The end of the interpreter would abort a thread that is in the middle of compiled code.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Process(uvicorn.Server):
    """Uvicorn, which listens while the model is loaded."""

    def __init__(self, config: uvicorn.Config, server: Server, options: ServeOptions) -> None:
        super().__init__(config)
        self.failed: Exception | None = None
        self._served, self._options = server, options
        self._loading: threading.Thread | None = None

    @property
    def is_loading(self) -> bool:
        """Whether the model is on its way, with nobody left to serve it to."""
        return self._loading is not None and self._loading.is_alive()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._loading = threading.Thread(target=self._load, args=(loop,), daemon=True)
        self._loading.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.draining = True
        await super().shutdown(sockets)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            engine = Engine.from_pretrained(self._options.model, self._options.config)
        except Exception as error:
            self.failed, self.should_exit = error, True
            return
        with suppress(RuntimeError):  # nobody waits for it any more: the loop is closed
            loop.call_soon_threadsafe(self._ready, engine)

    def _ready(self, engine: Engine) -> None:
        self._served.start(engine)
        announce(self._options)


def announce(options: ServeOptions) -> None:
    """Say that requests can come."""
    at = f"http://{options.host}:{options.port}/v1"
    ERRORS.print(f"serving {options.name} at {at}", highlight=False, soft_wrap=True)


def read_key(options: ServeOptions) -> str | None:
    """Return the key that requests must have.

    Raises:
        InputError: for a file that cannot be read or is empty, or none where others can reach the server.
    """
    key = os.environ.get(KEY)
    if options.key_file is not None:
        try:
            key = options.key_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"api-key-file={str(options.key_file)!r} cannot be read: {error}") from None
    if key is not None and not (key := key.strip()):
        raise InputError(f"the key, in {options.key_file or f'${KEY}'}, is empty")
    if key is None and options.host not in LOOPBACK and not options.without_key:
        way_out = f"give --api-key-file or ${KEY}, or --without-key if whoever reaches it may use it"
        raise InputError(f"host={options.host!r} lets others reach this server, so it needs a key: {way_out}")
    return key


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound; it is taken before the model is loaded.

    Raises:
        InputError: if it is taken already, or there is no such host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise InputError(f"host={host!r}, port={port} cannot be listened at: {error.strerror}") from None
    return listening


def _heard(number: int, frame: object) -> None:
    """Do nothing about a signal that has been obeyed."""


def log_requests() -> None:
    """Log to standard error: uvicorn's warnings, and a line a request."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("engine.serve").setLevel(logging.INFO)
