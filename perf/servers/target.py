"""The server that is measured, as the user names it: its address, its model's name, its API, and the key."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from engine import InputError

Api = Literal["chat", "completions"]
APIS: tuple[str, ...] = get_args(Api)
KEY = "PERF_TARGET_KEY"  # the environment variable that holds the key; it is saved nowhere


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI's API.

    url: without `/v1`, a slash at its end, or a query. query: is sent with every request, and never saved.
    model: the id that it serves; None: the first that it names. api: None: whichever fits the workload. key:
    sent as a bearer token.
    """

    url: str
    query: str = ""
    model: str | None = None
    api: Api | None = None
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, model: str | None = None, api: str | None = None) -> Target:
        """Return the target of `--target`, `--served-model` and `--api`; the key comes from the environment.

        Raises:
            InputError: for what is no address of a server, one that holds a password, or an API that is
                neither.
        """
        parts = urlsplit(url.strip())
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # from port
            whole = False
        if not whole:
            raise InputError(f"target={url!r} must be the address of a server: http://127.0.0.1:8000")
        if parts.username is not None or parts.password is not None:
            raise InputError(f"target has a user or a password in it: give the key in ${KEY}")
        if api is not None and api not in APIS:
            raise InputError(f"api={api!r} must be one of {', '.join(APIS)}")
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        address = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        return cls(address, parts.query, model, api, os.environ.get(KEY) or None)  # type: ignore[arg-type]

    def at(self, path: str) -> str:
        """Return the address of a path of the server, such as `/v1/models`."""
        return f"{self.url}{path}?{self.query}" if self.query else f"{self.url}{path}"
