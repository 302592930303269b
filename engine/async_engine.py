"""An asyncio front to an Engine: one worker thread steps it, any number of coroutines wait on it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable

from engine.engine import Engine
from engine.errors import check_type
from engine.input_processor import Prompt
from engine.request import Request, RequestOutput, SamplingParams, StreamChunk

LOG = logging.getLogger(__name__)
MAX_FAILURES = 3  # steps in a row that raise, before the engine must show that it can compute anything


class Waiter:
    """A coroutine that waits for the chunks of its request, in an event loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.items = asyncio.Queue[StreamChunk | BaseException]()
        self.request: Request | None = None

    def give(self, item: StreamChunk | BaseException) -> bool:
        """Hand something over, from any thread; return False if the event loop is closed: nobody waits."""
        try:
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            if not self.loop.is_closed():
                raise
            return False
        return True


class AsyncEngine:
    """An engine that coroutines share; nothing else may use it meanwhile.

    A coroutine that is cancelled, or leaves its stream, aborts its request. The requests of a step that
    raises end with reason "error", and the engine goes on for all others. Only when several steps in a row
    have raised, and so has one for a request of the engine's own, the worker ends, and every waiter, present
    and future, gets a RuntimeError. Use it as `async with AsyncEngine(engine) as served:`.

    Raises:
        InputError: for what is no Engine.
    """

    def __init__(self, engine: Engine) -> None:
        check_type("engine", engine, Engine, "make one first, such as Engine.from_pretrained('smollm2')")
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._waiting: set[Waiter] = set()
        self._lock = threading.Lock()
        self._ended: str | None = None  # why, once the worker has
        self._failures = 0  # steps that raised, with no token in between
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()
        atexit.register(self.close)  # a thread in the middle of a step must not outlive the interpreter

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
    ) -> AsyncIterator[StreamChunk]:
        """Yield the chunks for one prompt as they come. Raises as `generate` does."""
        waiter = Waiter()
        with self._lock:
            if self._ended is not None:
                raise RuntimeError(self._ended)
            self._waiting.add(waiter)
        self._commands.put(lambda: self._add(waiter, prompt, params))
        try:
            while True:
                item = await waiter.items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.output is not None:
                    return
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

    def _add(self, waiter: Waiter, prompt: Prompt, params: SamplingParams | None) -> None:
        """Queue a request; its caller hears what is wrong with it."""

        def give(chunk: StreamChunk) -> None:
            if not waiter.give(chunk):
                self._leave(waiter)

        try:
            waiter.request = self._engine.add_request(prompt, params, on_chunk=give)
        except Exception as error:
            waiter.give(error)

    def _leave(self, waiter: Waiter) -> None:
        """Forget a coroutine that waits no more, and end its request if it has not ended."""
        with self._lock:
            self._waiting.discard(waiter)
        if waiter.request is not None:
            self._engine.abort(waiter.request.id)

    def _work(self) -> None:
        why = "the engine has been closed"
        try:
            while (command := self._next()) is not None:
                command()
        except BaseException as error:
            LOG.exception("the engine has ended")
            why = f"the engine has ended: {error}"
        with self._lock:
            self._ended = why
            waiting = list(self._waiting)
        for waiter in waiting:
            waiter.give(RuntimeError(why))
            self._leave(waiter)

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
