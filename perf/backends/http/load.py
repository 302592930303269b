"""Load: each request is sent when it is due, or as soon as one of a fixed number of places is free.

Latencies count from when a request was due (no coordinated omission); how late it was sent is the client's
own fault, and is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from perf.backends.http.connection import Connection, Exchange
from perf.backends.http.prompts import RoundPrompts
from perf.backends.http.reply import Reply

NAP_S = 0.002  # before a request is due it is waited for without sleeping: timers are a millisecond late


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
    connection: Connection, prompts: RoundPrompts, read: Callable[[Exchange], Reply], places: int | None
) -> list[Sent]:
    """Send every request and wait for all of them.

    Args:
        prompts: of a round; each says when it is due.
        read: reads a stream that has ended.
        places: requests on their way at once, at most; one that waits for a place is due when it gets it.
            None: no bound.
    """
    items, path = prompts.items, prompts.dialect.path
    ended: list[Sent | None] = [None] * len(items)
    replies: list[Reply | None] = [None] * len(items)
    known = {i: prompts.body(i, replies) for i, item in enumerate(items) if item.follows is None}
    over = [asyncio.Event() for _ in items]
    room: AbstractAsyncContextManager[object] = nullcontext() if places is None else asyncio.Semaphore(places)

    async def one(index: int) -> None:
        item, since = items[index], start
        if item.follows is not None:
            await over[item.follows].wait()
            since = time.perf_counter()
        at = since + item.arrival_s
        body = known.get(index) or prompts.body(index, replies)
        await _until(at)
        async with room:
            if places is not None:
                at = max(at, time.perf_counter())
            exchange = await connection.stream(path, body)
        replies[index] = reply = read(exchange)
        ended[index] = Sent(at, exchange, reply)
        over[index].set()

    start = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(len(items))))
    return [sent for sent in ended if sent is not None]


async def _until(at: float) -> None:
    """Wait for a time, and be awake when it comes."""
    if (left := at - time.perf_counter()) > NAP_S:
        await asyncio.sleep(left - NAP_S)
    while time.perf_counter() < at:
        await asyncio.sleep(0)
