"""Engine: the loop plan -> run -> commit -> publish, and the ways to drive it.

It owns a request from `add_request` to its output. What runs next is the scheduler's business, how it is computed
the runner's; here is what remains: checking input, text, timestamps and handing results out.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from engine import models
from engine.config import EngineConfig
from engine.errors import InputError
from engine.machine import limit_threads, placement
from engine.memory import kv_memory, out_of_memory
from engine.metrics import EngineMetrics
from engine.models import LoadedModel, kv_bytes_per_token, load, positions
from engine.pages import PagePool, RowPool
from engine.request import Choice, FinishReason, OnChunk, Request, RequestOutput, SamplingParams, StreamChunk
from engine.runner import Runner, Ticket
from engine.runner.graphs import packed_runner
from engine.runner.packed import page_token_bytes
from engine.runner.padded import PaddedRunner
from engine.scheduler import Scheduler, Step
from engine.text import TextStream, decode, stop_tokens
from engine.workload import WorkItem

LOG = logging.getLogger(__name__)
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose tokens the host has not read, when it began (seconds), and the KV positions it holds for nothing."""

    step: Step
    ticket: Ticket
    started: float
    unused: int


class Engine:
    """Generates from a causal LM with batched requests.

    Args:
        loaded: a model and its tokenizer, from `engine.load`; engines that take turns may share one.
        config: how to batch. Its device and dtype become those of the loaded model.

    Raises:
        InputError: for a model that cannot be batched, or memory for keys and values that holds no token.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        asked = config or EngineConfig()
        model = self.model = loaded.model
        self.loaded, self.tokenizer, self.spec = loaded, loaded.tokenizer, loaded.spec
        place = str(model.device), str(model.dtype).removeprefix("torch.")
        if model.device.type == "cpu":
            limit_threads()
        config = asked.settled(*place)
        self.vocab_size, self.output_size = models.vocabulary(loaded)
        self.max_positions, self._why_no_more = positions(model.config)
        self.eos_ids = models.eos_ids(loaded, self.output_size)
        self.defaults = models.sampling_defaults(loaded) if config.generation_config == "auto" else {}
        token_bytes = kv_bytes_per_token(model)
        memory = kv_memory(model, config, min(config.max_step_tokens or sys.maxsize, self.max_positions))
        if memory < token_bytes * (config.page_size if config.runner == "packed" else 1):
            raise InputError(f"kv_memory={config.kv_memory} is too small: a token takes {token_bytes} bytes")
        try:
            self._build(config, memory, token_bytes)
        except InputError as error:
            if config.runner == "padded" or asked.must_pack:
                raise
            lost = "requests cannot join a running batch, and nothing is shared"
            warnings.warn(f"{error}; using runner='padded' and policy='dynamic': {lost}", stacklevel=2)
            config = replace(asked, runner="padded", policy="dynamic").settled(*place)
            self._build(config, memory, token_bytes)
        self.metrics = EngineMetrics(config.metrics_window)
        self._requests: dict[str, Request] = {}
        self._launched: deque[Launched] = deque()  # two at most, and only while the second is being launched
        self._collected = 0.0  # when the last one was read
        self._ids = itertools.count()
        self._seeds = np.random.default_rng(config.seed)

    def _build(self, config: EngineConfig, memory: int, token_bytes: int) -> None:
        """Make what a settled config says: runner, scheduler and the accounting of so many bytes of memory.

        Args:
            token_bytes: what the model's own cache takes for a token. (Pages hold what its attention is given, which
                may be more: some models compress what they keep.)
        """
        assert config.max_step_tokens is not None
        self.config, tokens, rows = config, config.max_step_tokens, config.max_batch_size
        self.runner: Runner
        if config.runner == "packed":
            useful = 2 * rows * -(-self.max_positions // config.page_size)
            page_bytes = page_token_bytes(self.model) * config.page_size
            pages = memory // page_bytes
            if not pages:
                raise InputError(f"kv_memory={config.kv_memory} is too small: a page takes {page_bytes} bytes")
            pool = PagePool(min(pages, useful), config.page_size, config.prefix_caching)
            self.runner = packed_runner(self.model, pool, config.deterministic, rows, config.dtype == "int8")
            self.scheduler = Scheduler(config.policy, rows, tokens, pool)
        else:
            self.runner = PaddedRunner(self.model, tokens)
            self.scheduler = Scheduler(config.policy, rows, sys.maxsize, RowPool(memory // token_bytes))

    @classmethod
    def from_pretrained(cls, spec: str, config: EngineConfig | None = None, *, progress: bool = True) -> Engine:
        """Load the model that `spec` names (hub id, folder, .gguf file, `smollm2`, `random:NAME`) and build on it.

        Raises:
            InputError: for an unknown or broken model, or a device that is not there.
        """
        config = config or EngineConfig()
        device, dtype = placement(config.device, config.dtype)
        return cls(load(spec, device=device, dtype=dtype, seed=config.seed, progress=progress), config)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a step is under way, so that `step` would do something."""
        return self.scheduler.has_work or bool(self._launched)

    def encode(self, prompt: Prompt, *, name: str = "prompt") -> list[int]:
        """A prompt's token ids, checked; `name` is what errors call it."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(f"{name} is text, but {self.spec} has no tokenizer: give token ids")
            prompt = self.tokenizer(prompt).input_ids if prompt else []
            models.check_tokenized(self.loaded, name, prompt, self.vocab_size)
        if isinstance(prompt, Sequence | np.ndarray) and not len(prompt):
            raise InputError(f"{name} is empty: give at least one token")
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of different lengths
            ids = np.array(None)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{name}={prompt!r} must be text or a list of token ids")
        models.check_ids(self.spec, name, known := ids.tolist(), self.vocab_size)
        return known

    def chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the model's chat template, up to where its answer begins."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InputError(f"{self.spec} has no chat template: give the message as a plain prompt")
        turns = [{"role": "user", "content": message}]
        ids: Any = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        models.check_tokenized(self.loaded, "message", ids, self.vocab_size)
        return list(ids)

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        arrival: float | None = None,
        on_chunk: OnChunk = None,
    ) -> Request:
        """Queue a request. `step` then works on it, and sets its `result` when it ends.

        Args:
            prompt: text or token ids.
            params: how to draw tokens and when to stop; what it leaves open, the model may say.
            request_id: a name of the caller's, unlike that of any unfinished request; made up if None.
            arrival: when it was due (`time.perf_counter` seconds); now if None.
            on_chunk: called with each chunk, text included. Without it, text is decoded once, at the end.

        Raises:
            InputError: before any work, for whatever cannot be served, naming the field and the bound.
        """
        request = self._make("prompt", prompt, params or SamplingParams(), request_id, on_chunk)
        request.arrival = time.perf_counter() if arrival is None else arrival
        self._queue(request)
        return request

    def step(self) -> list[StreamChunk]:
        """Compute one step; gives what it added to each request.

        Where the runner need not wait for tokens, this launches a step and gives what the one before it added.

        Raises:
            Exception: what the model raises. The step's requests then have ended with reason "error" (on Ctrl-C,
                "abort"), the others are as they were, and the engine can go on.
        """
        started = time.perf_counter()
        chunks: list[StreamChunk] = []
        if self._launched and self.scheduler.may_preempt:  # a request with a pending token cannot be computed again
            chunks += self._collect()
        step = self.scheduler.plan(started)
        if step and not self._launch(step, started):
            return chunks + self.step()
        ahead = 1 if step and self._launched[-1].ticket.late else 0
        while len(self._launched) > ahead:
            chunks += self._collect()
        return chunks

    def _launch(self, step: Step, started: float) -> bool:
        """Start a step; False if memory ran out and steps are smaller from now on."""
        try:
            ticket = self.runner.launch(step)
        except BaseException as error:
            if out_of_memory(error) and self.scheduler.shrink(step):
                LOG.warning("out of memory: steps have at most %d tokens from now on", self.scheduler.max_step_tokens)
                return False
            while self._launched:
                self._collect()
            self._fail(step, error)
            raise
        unused = sum(self.scheduler.memory.unused(r, r.computed + n) for r, n in step)
        self.scheduler.advance(step)
        self._launched.append(Launched(step, ticket, started, unused))
        return True

    def _collect(self) -> list[StreamChunk]:
        """Read the tokens of the step launched first, commit and publish it."""
        launched = self._launched.popleft()
        step = launched.step
        try:
            result = launched.ticket.collect()
        except BaseException as error:
            self._fail(step, error)
            raise
        # What a request computed after its end, before the host could know, is thrown away.
        choices = [c if r.finish_reason is None else None for (r, _), c in zip(step, result.choices, strict=True)]
        self.scheduler.commit(step, [None if c is None else c.token for c in choices], time.perf_counter())
        pairs = zip(step, choices, strict=True)
        chunks = [self._publish(r, choice) for (r, _), choice in pairs if choice is not None and r.result is None]
        now = time.perf_counter()
        seconds = now - max(launched.started, self._collected)
        self._collected = now
        result = replace(result, choices=choices, model_s=min(result.model_s, seconds))  # steps may overlap
        self.metrics.count_step(len(step), result, seconds, launched.unused)
        return chunks

    def _fail(self, step: Step, error: BaseException) -> None:
        """End every request of a step that could not be computed."""
        reason = FinishReason.ERROR if isinstance(error, Exception) else FinishReason.ABORT
        for request, _ in step:
            self._end(request, reason, repr(error))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs come in the order of the prompts.

        Args:
            prompts: texts or lists of token ids (a single text is a list of one).
            params: one for all, or one for each; what it leaves open, the model may say (`EngineConfig`).
            progress: show a bar on standard error if it takes longer than two seconds.

        Returns:
            An output a prompt. A request that failed alone says so in its `finish_reason` and `error`. Ctrl-C ends
            the call early: unfinished requests have reason "abort" and the tokens they got.

        Raises:
            InputError: before any work, if any prompt or its parameters cannot be served; it says which.
        """
        each: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        many = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(each)
        if len(many) != len(each):
            raise InputError(f"params has {len(many)} entries for {len(each)} prompts: give one, or one for each")
        return self.replay(list(map(WorkItem, each, many)), progress=progress)

    def replay(self, items: Sequence[WorkItem], *, progress: bool = True) -> list[RequestOutput]:
        """As `generate`, for requests that are each due at a time of their own, `arrival_s` after now."""
        requests = [self._make(f"prompts[{i}]", item.prompt, item.params) for i, item in enumerate(items)]
        if not requests:
            raise InputError("prompts is empty: give at least one")
        start = time.perf_counter()
        for request, item in zip(requests, items, strict=True):
            request.arrival = start + item.arrival_s
        pending = deque(sorted(requests, key=lambda request: request.arrival))
        with tqdm(total=len(requests), unit="req", desc="generate", delay=2.0, disable=not progress) as bar:
            try:
                while any(request.result is None for request in requests):
                    while pending and pending[0].arrival <= time.perf_counter():
                        self._queue(pending.popleft())
                    if not self.has_work:
                        time.sleep(max(0.0, pending[0].arrival - time.perf_counter()))
                    bar.update(sum(chunk.output is not None for chunk in self.step()))
            except KeyboardInterrupt:
                bar.write("interrupted: unfinished requests end with reason 'abort'", file=sys.stderr)
            finally:
                for request in requests:
                    self._end(request, FinishReason.ABORT)
        return [request.result for request in requests if request.result is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate for one prompt and give its chunks as they come; leaving the loop early aborts the request.

        Several streams may be read in turn: whichever is read steps the engine for all.

        Raises:
            InputError: at the call, not at the first chunk.
        """
        chunks: deque[StreamChunk] = deque()
        return self._drain(self.add_request(prompt, params, on_chunk=chunks.append), chunks)

    def _drain(self, request: Request, chunks: deque[StreamChunk]) -> Iterator[StreamChunk]:
        try:
            while request.result is None or chunks:
                while chunks:
                    yield chunks.popleft()
                if request.result is None:
                    self.step()
        finally:
            self._end(request, FinishReason.ABORT)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state and give what it has; None if no unfinished request has this id."""
        request = self._requests.get(request_id)
        return self._end(request, FinishReason.ABORT) if request is not None else None

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput | None:
        if request.result is None:
            request.finish(reason, error=error)
            self._close(request)
        return request.result

    def _make(
        self, name: str, prompt: Prompt, params: SamplingParams, request_id: str | None = None, on_chunk: OnChunk = None
    ) -> Request:
        """A request that has passed every check; `name` is what errors call its prompt."""
        tokens = self.encode(prompt, name=name)
        params = models.with_defaults(params, self.defaults, self.max_positions - len(tokens))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        seed = int(self._seeds.integers(2**63)) if params.seed is None else params.seed
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        if request_id in self._requests:
            raise InputError(f"request_id={request_id!r} is that of an unfinished request: choose another")
        names = stop_tokens(self.tokenizer, params.stop) if params.stop and self.tokenizer is not None else {}
        stop_ids |= names.keys()
        request = Request(request_id, len(tokens), params, tokens, stop_ids, seed, on_chunk=on_chunk)
        request.stop_names = names
        if request.max_len > self.max_positions:
            raise InputError(
                f"{name} of {len(tokens)} tokens with max_new_tokens={params.max_new_tokens} needs {request.max_len} "
                f"positions; {self.spec} has {self.max_positions}{self._why_no_more}: shorten one of the two"
            )
        if params.stop and self.tokenizer is None:
            raise InputError(f"stop={params.stop!r} needs text, but {self.spec} has no tokenizer: use stop_token_ids")
        models.check_ids(self.spec, "stop_token_ids", params.stop_token_ids, self.output_size)
        self.scheduler.memory.check(request)
        if self.tokenizer is not None and (on_chunk is not None or params.stop):
            request.text = TextStream(self.tokenizer, params.stop)
        return request

    def _queue(self, request: Request) -> None:
        self._requests[request.id] = request
        self.scheduler.add(request)

    def _publish(self, request: Request, choice: Choice) -> StreamChunk:
        """Turn what a step gave a request into its chunk; whatever fails in here fails this request alone."""
        ids, text = () if choice.token is None else (choice.token,), ""
        if choice.error is not None:
            request.finish(FinishReason.ERROR, error=choice.error)
        try:
            if choice.logprob is not None:
                request.logprobs.append(choice.logprob)
            if request.text is not None and ids and not request.stopped_by_token:
                text = request.text.push(*ids, look=request.output_len >= request.params.min_new_tokens)
                if request.text.stopped is not None:
                    request.finish(FinishReason.STOP, request.text.stopped)
            chunk = StreamChunk(request.id, ids, text)
            if request.on_chunk is not None and request.finish_reason is None:
                request.on_chunk(chunk)
        except Exception as failure:
            request.finish(FinishReason.ERROR, error=repr(failure))
        return chunk if request.finish_reason is None else self._close(request, ids, text)

    def _close(self, request: Request, ids: tuple[int, ...] = (), text: str = "") -> StreamChunk:
        """Let a request go that has a finish reason: free its place, record its metrics, hand out its output."""
        self.scheduler.release(request)
        self._requests.pop(request.id, None)
        whole = None
        if request.text is not None:
            text += request.text.flush()
            whole = request.text.text
            if request.text.stopped is not None and request.finish_reason is FinishReason.LENGTH:
                request.finish(FinishReason.STOP, request.text.stopped)
        elif self.tokenizer is not None:
            whole = decode(self.tokenizer, request.shown_ids)
        output = request.close(whole, time.perf_counter())
        chunk = StreamChunk(request.id, ids, text, output)
        self.metrics.add(output.metrics)
        if request.on_chunk is not None:
            try:
                request.on_chunk(chunk)
            except Exception:
                LOG.exception("request %s: its callback failed on the last chunk; its result stands", request.id)
        return chunk
