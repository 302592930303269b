"""The loop plan -> launch -> commit -> publish: what takes a request from the queue to its output.

What runs next is the scheduler's business, how it is computed the runner's. Here a step's tokens become text
and chunks; and what fails ends the requests whose fault it is, and no others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from engine.detokenizer import decode
from engine.errors import InputError, shown
from engine.metrics import EngineMetrics
from engine.request import FinishReason, Request, RequestOutput, StreamChunk
from engine.runner import Runner
from engine.runner.memory import out_of_memory
from engine.scheduler import Scheduler, Step
from engine.step import Choice, Ticket, TokenLogprob

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens the host has not read, when it began (seconds), and the KV it holds for nothing."""

    step: Step
    ticket: Ticket
    started: float
    unused: int


class Loop:
    """Steps the requests that are queued, until each has its output. What derives from it makes the parts."""

    runner: Runner
    scheduler: Scheduler
    tokenizer: Any

    def __init__(self, metrics: EngineMetrics) -> None:
        self.metrics = metrics
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._launched: deque[Launched] = deque()  # two at most, and only while the second is being launched
        self._collected = 0.0  # when the last one was read
        self._stepping = False

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a step is in flight, so that `step` would do something."""
        return self.scheduler.has_work or bool(self._launched)

    def step(self) -> list[StreamChunk]:
        """Compute one step; gives what it added to each request.

        Where the runner need not wait for tokens, this launches a step and gives what the one before added.
        A packed step that fails is tried again in parts: the request that fails by itself ends with reason
        "error", and the others go on.

        Raises:
            Exception: what the model raises where no request of the step could be computed. They have ended
                then with reason "error" (on Ctrl-C, "abort"), all others are as they were, and the engine can
                go on.
            InputError: if a request's own callback calls it, in the middle of a step.
        """
        if self._stepping:
            raise InputError("step was called within a step: on_chunk may add and abort requests, no more")
        self._stepping = True
        try:
            return self._step()
        finally:
            self._stepping = False

    def _step(self) -> list[StreamChunk]:
        started = time.perf_counter()
        chunks: list[StreamChunk] = []
        if self._launched and self.scheduler.may_preempt:  # who has a pending token cannot be computed again
            chunks += self._collect()
        step = self.scheduler.plan(started)
        error = self._try(step, started, chunks) if step else None
        if error is not None:
            raise error
        ahead = 1 if step and self._launched and self._launched[-1].ticket.is_async else 0
        while len(self._launched) > ahead:
            chunks += self._collect()
        return chunks

    def _try(self, step: Step, started: float, chunks: list[StreamChunk]) -> Exception | None:
        """Launch a step; where that raises, less: fewer tokens from now on if memory ran out, else its parts.

        Returns what was raised if none of its requests can go on: they have ended then. What is collected on
        the way is added to `chunks`.
        """
        try:
            ticket = self.runner.launch(step)
        except BaseException as error:
            while self._launched:
                chunks += self._collect()
            step = [(request, count) for request, count in step if request.result is None]
            if not isinstance(error, Exception):
                self._fail(step, error)
                raise
            if out_of_memory(error) and self.scheduler.shrink(step):
                most = self.scheduler.max_step_tokens
                LOG.warning("out of memory: steps have at most %d tokens from now on", most)
                return None
            parts = self.scheduler.parts(step)
            if not parts:
                self._fail(step, error)
                return error
            failed = [self._failed(part, started, chunks) for part in parts]
            return error if all(failed) else None
        self.scheduler.advance(step)
        unused = self.scheduler.memory.unused([request for request, _ in step])
        self._launched.append(Launched(step, ticket, started, unused))
        return None

    def _failed(self, part: Step, started: float, chunks: list[StreamChunk]) -> bool:
        """Compute a part of a step that failed as a whole; gives whether none of its requests can go on."""
        error = self._try(part, started, chunks)
        while self._launched:  # no other part knows where its tokens lie on the device
            chunks += self._collect()
        if error is not None:
            names = ", ".join(request.id for request, _ in part)
            LOG.warning("ended with an error: %s", names, exc_info=error)
        return error is not None

    def _collect(self) -> list[StreamChunk]:
        """Read the tokens of the step launched first, commit and publish it."""
        launched = self._launched.popleft()
        step = launched.step
        try:
            result = launched.ticket.collect()
            # What a request computed after its end, before the host could know, is thrown away.
            pairs = zip(step, result.choices, strict=True)
            choices = [choice if request.finish_reason is None else None for (request, _), choice in pairs]
            tokens = [None if choice is None else choice.token for choice in choices]
            self.scheduler.commit(step, tokens, time.perf_counter())
            chunks = [
                self._publish(request, choice)
                for (request, _), choice in zip(step, choices, strict=True)
                if choice is not None and request.result is None
            ]
        except BaseException as error:  # else who has a reason to end, but no output, never would
            self._fail(step, error)
            raise
        now = time.perf_counter()
        seconds = now - max(launched.started, self._collected)
        self._collected = now
        result = replace(result, choices=choices, model_s=min(result.model_s, seconds))  # steps may overlap
        self.metrics.count_step(len(step), result, seconds, launched.unused)
        return chunks

    def _fail(self, step: Step, error: BaseException) -> None:
        """End every request of a step that could not be computed, even if a callback is interrupted."""
        reason = FinishReason.ERROR if isinstance(error, Exception) else FinishReason.ABORT
        with contextlib.ExitStack() as stack:
            for request, _ in reversed(step):
                stack.callback(self._end, request, reason, _told(error))

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput | None:
        """End a request in any state; gives its output."""
        if request.result is None:
            request.finish(reason, error=error)
            self._close(request)
        return request.result

    def _queue(self, request: Request) -> None:
        """Let a request that is known wait for its turn, unless it has been aborted before it was due."""
        if request.result is None:
            self.scheduler.add(request)

    def _publish(self, request: Request, choice: Choice) -> StreamChunk:
        """Turn what a step gave a request into its chunk; whatever fails in here fails this request alone."""
        token, error, logprob = choice
        ids, text = () if token is None else (token,), ""
        logprobs = () if logprob is None else (logprob,)
        if error is not None:
            request.finish(FinishReason.ERROR, error=error)
        try:
            if logprob is not None:
                request.logprobs.append(logprob)
            if request.text is not None and ids and not request.stopped_by_token:
                text = request.text.push(*ids, look=request.output_len >= request.params.min_new_tokens)
                if request.text.stopped is not None:
                    request.finish(FinishReason.STOP, request.text.stopped)
            chunk = StreamChunk(request.id, ids, text, None, logprobs)
            if request.on_chunk is not None and request.finish_reason is None:
                request.on_chunk(chunk)
        except Exception as failure:
            if request.result is None:
                request.finish(FinishReason.ERROR, error=_told(failure))
        if request.result is not None:  # its callback aborted it
            return StreamChunk(request.id, ids, text, request.result, logprobs)
        return chunk if request.finish_reason is None else self._close(request, ids, text, logprobs)

    def _close(
        self,
        request: Request,
        ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> StreamChunk:
        """Let a request go that has a finish reason: free its place, record its metrics, give its output."""
        self.scheduler.release(request)
        self._requests.pop(request.id, None)
        whole = None
        try:
            if request.text is not None:
                whole = request.text.text
                text += request.text.flush()
                whole = request.text.text
                if request.text.stopped is not None and request.finish_reason is FinishReason.LENGTH:
                    request.finish(FinishReason.STOP, request.text.stopped)
            elif self.tokenizer is not None:
                whole = decode(self.tokenizer, request.shown_ids)
        except Exception as failure:
            request.finish(FinishReason.ERROR, error=_told(failure))
        output = request.close(whole, time.perf_counter())
        chunk = StreamChunk(request.id, ids, text, output, logprobs)
        self.metrics.add(output.metrics)
        if request.on_end is not None:
            request.on_end(request)
        if request.on_chunk is not None:
            try:
                request.on_chunk(chunk)
            except Exception:
                LOG.exception("%s: its callback failed on the last chunk; its result stands", request.id)
        return chunk


def _told(error: BaseException) -> str:
    """The repr of an exception, or its class where its repr raises."""
    try:
        return repr(error)
    except Exception:
        return shown(error)
