"""An asyncio front to an Engine: one worker thread steps it, any number of coroutines wait on it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial

from engine.engine import Engine
from engine.errors import check_type
from engine.input_processor import Prompt
from engine.request import Request, RequestOutput, SamplingParams, StreamChunk

LOG = logging.getLogger(__name__)
MAX_FAILURES = 3  # steps in a row that raise, before the engine must show that it can compute anything
Item = tuple[int, StreamChunk] | BaseException  # a chunk of a prompt, by its number, or why none comes


class Waiter:
    """A coroutine that waits for the chunks of its requests, in an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.items = asyncio.Queue[Item]()
        self.requests: list[Request] = []

    async def next(self) -> tuple[int, StreamChunk]:
        """Return the next chunk, with the index of its prompt, or raise what came instead."""
        item = await self.items.get()
        if isinstance(item, BaseException):
            raise item
        return item


class AsyncEngine:
    """An engine that coroutines share; nothing else may use it meanwhile.

    A coroutine that is cancelled, or leaves its stream, aborts its requests. The requests of a step that
    raises end with reason "error", and the engine goes on for all others. Only when several steps in a row
    have raised, and so has one for a request of the engine's own, the worker ends, and every waiter, present
    and future, gets a RuntimeError. Use it as `async with AsyncEngine(engine) as served:`.

    What a step gives is handed to an event loop in one call, however many requests it is for: each call wakes
    the loop's thread, which the worker would otherwise wait for. A request's latencies count from when its
    coroutine asked, so that the step which the worker was in just then is part of them.

    Raises:
        InputError: for what is no Engine.
    """

    def __init__(self, engine: Engine) -> None:
        check_type("engine", engine, Engine, "make one first, such as Engine.from_pretrained('smollm2')")
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._waiting: set[Waiter] = set()
        self._outbox: list[tuple[Waiter, Item]] = []  # of the worker alone
        self._lock = threading.Lock()
        self._ended: str | None = None  # why, once the worker has
        self._failures = 0  # steps that raised, with no token in between
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a thread in the middle of a step must not outlive the interpreter

    @property
    def ended(self) -> str | None:
        """Why the worker has ended; None while it works."""
        return self._ended

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Return the output for one prompt.

        Raises:
            InputError: as `Engine.add_request` does, to this caller alone.
            RuntimeError: if the worker has ended, saying why.
        """
        chunks = [chunk async for chunk in self.stream(prompt, params)]
        assert chunks[-1].output is not None
        return chunks[-1].output

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[StreamChunk, None]:
        """Yield the chunks for one prompt as they come. Raises as `generate` does."""
        waiter = self._enter([prompt], params)
        try:
            while True:
                _, chunk = await waiter.next()
                yield chunk
                if chunk.output is not None:
                    return
        finally:
            self._commands.put(lambda: self._leave(waiter))

    async def stream_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, arrival: float | None = None
    ) -> AsyncGenerator[tuple[int, StreamChunk], None]:
        """Yield the chunks for several prompts as they come, each with its prompt's index.

        Their latencies count from `arrival` (`time.perf_counter` seconds); from now if None. Raises as
        `generate` does; if one prompt is refused, none is served.
        """
        waiter, left = self._enter(prompts, params, arrival), len(prompts)
        try:
            while left:
                index, chunk = await waiter.next()
                left -= chunk.output is not None
                yield index, chunk
        finally:
            self._commands.put(lambda: self._leave(waiter))

    def close(self) -> None:
        """End the worker after the step it is in; requests that have not finished get a RuntimeError."""
        self._commands.put(None)
        if threading.current_thread() is not self._worker:
            self._worker.join()
        atexit.unregister(self.close)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _enter(
        self, prompts: Sequence[Prompt], params: SamplingParams | None, arrival: float | None = None
    ) -> Waiter:
        """Have the worker queue requests for the coroutine that calls; it must `_leave` in the end.

        Raises:
            RuntimeError: if the worker has ended.
        """
        waiter = Waiter()
        arrived = time.perf_counter() if arrival is None else arrival
        with self._lock:
            if self._ended is not None:
                raise RuntimeError(self._ended)
            self._waiting.add(waiter)
        self._commands.put(lambda: self._add(waiter, prompts, params, arrived))
        return waiter

    def _add(
        self, waiter: Waiter, prompts: Sequence[Prompt], params: SamplingParams | None, arrival: float
    ) -> None:
        """Queue requests; their caller hears what is wrong with one of them."""
        try:
            for index, prompt in enumerate(prompts):
                give = partial(self._give, waiter, index)
                added = self._engine.add_request(prompt, params, arrival=arrival, on_chunk=give)
                waiter.requests.append(added)
        except Exception as error:
            self._outbox.append((waiter, error))
            self._leave(waiter)

    def _give(self, waiter: Waiter, index: int, chunk: StreamChunk) -> None:
        self._outbox.append((waiter, (index, chunk)))

    def _leave(self, waiter: Waiter) -> None:
        """Forget a coroutine that waits no more, and end its requests that have not ended."""
        with self._lock:
            self._waiting.discard(waiter)
        for request in waiter.requests:
            self._engine.abort(request.id)

    def _deliver(self) -> None:
        """Hand over what has come, to each event loop in one call; who was in a closed one waits no more."""
        while self._outbox:  # who leaves may add to it
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Waiter, Item]]] = {}
            for waiter, item in self._outbox:
                by_loop.setdefault(waiter.loop, []).append((waiter, item))
            self._outbox = []
            for loop, items in by_loop.items():
                try:
                    loop.call_soon_threadsafe(_put, items)
                except RuntimeError:
                    if not loop.is_closed():
                        raise
                    for waiter, _ in items:
                        self._leave(waiter)

    def _work(self) -> None:
        why = "the engine has been closed"
        try:
            while (command := self._next()) is not None:
                command()
                self._deliver()
        except BaseException as error:
            LOG.exception("the engine has ended")
            why = f"the engine has ended: {error}"
        with self._lock:
            self._ended = why
            waiting = list(self._waiting)
        self._outbox += [(waiter, RuntimeError(why)) for waiter in waiting]
        for waiter in waiting:
            self._leave(waiter)
        self._deliver()

    def _next(self) -> Callable[[], object] | None:
        """Return a command, else a step, else wait for a command; None is the command to end."""
        try:
            return self._commands.get(block=not self._engine.has_work)
        except queue.Empty:
            return self._step

    def _step(self) -> None:
        """Step the engine; raise RuntimeError if nothing can be computed any more.

        What a step raises has ended that step's requests, and is of no concern to others.
        """
        try:
            if self._engine.step():
                self._failures = 0
        except Exception as error:
            self._failures += 1
            LOG.exception("a step failed, %d in a row; its requests have ended", self._failures)
            if self._failures < MAX_FAILURES:
                return
            if not self._engine.is_healthy():
                failed = f"{self._failures} steps in a row failed, and so did one for a request of its own"
                raise RuntimeError(f"{failed}; the last said {error!r}") from error
            self._failures = 0


def _put(items: list[tuple[Waiter, Item]]) -> None:
    for waiter, item in items:
        waiter.items.put_nowait(item)
