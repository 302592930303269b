"""Load: each request is sent when it is due, or as soon as one of a fixed number of places is free.

Latencies count from when a request was due (no coordinated omission); how late it was sent is the client's
own fault, and is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from perf.backends.http.connection import Connection, Exchange
from perf.backends.http.reply import Reply

NAP_S = 0.002  # before a request is due it is waited for without sleeping: timers are a millisecond late


@dataclass(frozen=True, slots=True)
class Due:
    """When a request is sent: seconds after the start, or after the end of the request that it follows."""

    after_s: float
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that has ended: when it was due (`time.perf_counter` seconds), its exchange and reply."""

    due_s: float
    exchange: Exchange
    reply: Reply

    @property
    def lag_ms(self) -> float:
        return (self.exchange.sent_s - self.due_s) * 1e3

    @property
    def error(self) -> str | None:
        return self.exchange.error or self.reply.error


async def send_all(
    connection: Connection,
    path: str,
    due: Sequence[Due],
    body: Callable[[int, Sequence[Sent | None]], bytes],
    read: Callable[[Exchange], Reply],
    places: int | None,
) -> list[Sent]:
    """Send every request and wait for all of them.

    Args:
        due: of each request; one that follows another comes after it.
        body: makes a request's JSON, given its index and those that have ended.
        read: reads a stream that has ended.
        places: requests on their way at once, at most; one that waits for a place is due when it gets it.
            None: no bound.
    """
    ended: list[Sent | None] = [None] * len(due)
    known = {i: body(i, ended) for i, when in enumerate(due) if when.follows is None}
    over = [asyncio.Event() for _ in due]
    room: AbstractAsyncContextManager[object] = nullcontext() if places is None else asyncio.Semaphore(places)

    async def one(index: int) -> None:
        when, since = due[index], start
        if when.follows is not None:
            await over[when.follows].wait()
            since = time.perf_counter()
        at = since + when.after_s
        ready = known.get(index) or body(index, ended)
        await _until(at)
        async with room:
            if places is not None:
                at = max(at, time.perf_counter())
            exchange = await connection.stream(path, ready)
        ended[index] = Sent(at, exchange, read(exchange))
        over[index].set()

    start = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(len(due))))
    return [sent for sent in ended if sent is not None]


async def _until(at: float) -> None:
    """Wait for a time, and be awake when it comes."""
    if (left := at - time.perf_counter()) > NAP_S:
        await asyncio.sleep(left - NAP_S)
    while time.perf_counter() < at:
        await asyncio.sleep(0)
