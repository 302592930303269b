"""An asyncio front to an Engine: one worker thread steps it, any number of coroutines wait on it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable

from engine.engine import Engine, Prompt
from engine.request import Request, RequestOutput, SamplingParams, StreamChunk

Give = Callable[[StreamChunk | BaseException], object]


class AsyncEngine:
    """Lets coroutines share an engine, which must not be used in any other way meanwhile.

    A coroutine that is cancelled, or leaves its stream, aborts its request. Should a step raise, the worker ends and
    every waiter, present and future, gets that error. Use it as `async with AsyncEngine(engine) as served:`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._waiting: set[Give] = set()
        self._lock = threading.Lock()
        self._ended: BaseException | None = None
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """The output for one prompt. Raises what `Engine.add_request` raises, or the error that ended the worker."""
        chunks = [chunk async for chunk in self.stream(prompt, params)]
        assert chunks[-1].output is not None
        return chunks[-1].output

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[StreamChunk]:
        """The chunks for one prompt as they come. Raises as `generate` does."""
        loop, chunks = asyncio.get_running_loop(), asyncio.Queue[StreamChunk | BaseException]()
        requests: list[Request] = []

        def give(item: StreamChunk | BaseException) -> None:
            loop.call_soon_threadsafe(chunks.put_nowait, item)

        def add() -> None:
            try:
                requests.append(self._engine.add_request(prompt, params, on_chunk=give))
            except ValueError as error:  # InputError and its like: this request's fault, and no one else's
                give(error)

        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._waiting.add(give)
        self._commands.put(add)
        try:
            while True:
                item = await chunks.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.output is not None:
                    return
        finally:
            with self._lock:
                self._waiting.discard(give)
            self._commands.put(lambda: [self._engine.abort(request.id) for request in requests])

    def close(self) -> None:
        """End the worker after the step it is in; requests that have not finished get a RuntimeError."""
        self._commands.put(None)
        self._worker.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _work(self) -> None:
        end: BaseException = RuntimeError("the engine has been closed")
        try:
            while (command := self._next()) is not None:
                command()
        except BaseException as error:
            end = error
        with self._lock:
            self._ended = end
            for give in self._waiting:
                give(end)

    def _next(self) -> Callable[[], object] | None:
        """What to do now: a command, else a step, else wait for a command; None is the command to end."""
        try:
            return self._commands.get(block=not self._engine.has_work)
        except queue.Empty:
            return self._engine.step
