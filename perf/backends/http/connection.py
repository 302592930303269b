"""HTTP as the client needs it: JSON both ways, and streams of which every part is stamped as it comes.

Nothing is looked at while a stream lasts: the parts are kept with their times and read afterwards, so that
the client takes as little of the machine as it can from a server on the same one.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from perf.backends.http.reply import error_text, shorten
from perf.servers.ready import TargetError
from perf.servers.target import Target

KEEP_S = (
    3.0  # an idle connection lives so long: servers close one after 5 s, perhaps just as it is used again
)
ANSWER_S = 30.0  # within which a server answers what is not streamed
SILENT_S = 300.0  # after so long without a byte a request has failed
STALE = (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, aiohttp.ClientOSError)
MOST_OPEN = 32  # connections that are opened before a round: some servers have a thread for each


@dataclass(slots=True)
class Exchange:
    """One streamed request: when it was sent, what came and when, and why it failed, if it did."""

    sent_s: float
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    status: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and headers of a request that is not streamed. json: None if the body is none."""

    status: int
    text: str
    json: Any


class Connection:
    """Connections to one server, kept open between requests; used inside one event loop."""

    def __init__(self, target: Target) -> None:
        self.target = target
        headers = {"Accept-Encoding": "identity"}
        if target.key:
            headers["Authorization"] = f"Bearer {target.key}"
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=SILENT_S)
        self._session = aiohttp.ClientSession(connector=kept, timeout=timeout, headers=headers)
        own = aiohttp.TCPConnector(limit=0, force_close=True)
        self._unshared = aiohttp.ClientSession(connector=own, timeout=timeout, headers=headers)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        await self._unshared.close()

    async def get(self, path: str) -> Answer:
        """Ask for a path, as `stream` does on a connection of its own after one that was stale.

        Raises:
            TargetError: if nothing answers.
        """
        try:
            try:
                return await self._ask(self._session, path)
            except STALE:
                return await self._ask(self._unshared, path)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = f"does not answer GET {path}: {reason(error)}"
            raise TargetError(f"{self.target.url} {why}") from error

    async def _ask(self, session: aiohttp.ClientSession, path: str) -> Answer:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with session.get(self.target.at(path), timeout=timeout) as response:
            text = await response.text(errors="replace")
        try:
            return Answer(response.status, text, json.loads(text))
        except ValueError:
            return Answer(response.status, text, None)

    async def stream(self, path: str, body: bytes) -> Exchange:
        """Send a request and keep what comes, whatever comes: a failure is in the exchange.

        One that meets a connection which the server has just closed is sent again on a new one, as curl does:
        HTTP has no way to tell beforehand. Others that are kept may be as stale, so the new one is its own.
        """
        exchange = Exchange(time.perf_counter())
        try:
            try:
                await self._read(self._session, path, body, exchange)
            except STALE:
                if exchange.status is not None:
                    raise
                await self._read(self._unshared, path, body, exchange)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            exchange.error = f"broke off: {reason(error)}"
        if exchange.status is not None and exchange.status != 200:
            exchange.error = (
                f"HTTP {exchange.status}: {_message(b''.join(part for _, part in exchange.parts))}"
            )
        return exchange

    async def _read(self, session: aiohttp.ClientSession, path: str, body: bytes, exchange: Exchange) -> None:
        headers = {"Content-Type": "application/json"}
        async with session.post(self.target.at(path), data=body, headers=headers) as response:
            exchange.status = response.status
            async for part in response.content.iter_any():
                exchange.parts.append((time.perf_counter(), part))

    async def open(self, count: int) -> None:
        """Have so many connections open: requests that follow at once find them. A server that closes each
        is let be."""
        await asyncio.gather(*(self.get("/v1/models") for _ in range(min(count, MOST_OPEN))))


def _message(body: bytes) -> str:
    text = body.decode("utf-8", errors="replace")
    try:
        return error_text(json.loads(text))
    except ValueError:
        return shorten(text) or "no message"


def reason(error: BaseException) -> str:
    """Return why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut short"
    return shorten(str(error)) or type(error).__name__
