"""Engine: what is asked of a model, checked before any work, and the ways to drive the loop that answers."""

from __future__ import annotations

import itertools
import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.detokenizer import TextStream, stop_tokens
from engine.errors import UNBOUNDED, InputError, check, check_list, check_text, check_type, shown
from engine.input_processor import InputProcessor, Prompt
from engine.loop import Loop
from engine.machine import limit_threads, placement
from engine.metrics import EngineMetrics
from engine.models import (
    LoadedModel,
    eos_ids,
    kv_bytes_per_token,
    load,
    positions,
    sampling_defaults,
    vocabulary,
    with_defaults,
)
from engine.progress import Progress
from engine.request import (
    FinishReason,
    OnChunk,
    Request,
    RequestOutput,
    SamplingParams,
    StreamChunk,
    WorkItem,
)
from engine.runner import make_runner
from engine.runner.memory import kv_memory
from engine.scheduler import Scheduler
from engine.timetable import Timetable, checked_items, longest_prompt

LOG = logging.getLogger(__name__)
BAR_AFTER_S = 2.0
NAP_S = 60.0  # at most, while nothing is due: a clock cannot sleep for any number of seconds


class Engine(Loop):
    """Generates from a causal LM with batched requests.

    Args:
        loaded: a model and its tokenizer, from `engine.load`; engines that take turns may share one.
        config: how to batch. Its device and dtype become those of the loaded model.

    Raises:
        InputError: for a model that cannot be batched, or memory for keys and values that holds no token.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        check_type("loaded", loaded, LoadedModel, "take it from engine.load, or use Engine.from_pretrained")
        check_type("loaded.model", loaded.model, PreTrainedModel, "take it from engine.load")
        asked = _config(config)
        super().__init__(EngineMetrics(asked.metrics_window))
        model = self.model = loaded.model
        if model.device.type == "cpu":
            limit_threads()
        self.loaded, self.tokenizer, self.spec = loaded, loaded.tokenizer, loaded.spec
        place = str(model.device), str(model.dtype).removeprefix("torch.")
        config = asked.resolve(*place)
        self.vocab_size, self.output_size = vocabulary(loaded)
        self.max_positions, why_no_more = positions(model.config)
        limits = self.vocab_size, self.output_size, self.max_positions, why_no_more
        self._input = InputProcessor(self.spec, self.tokenizer, *limits)
        self.eos_ids = eos_ids(loaded, self.output_size)
        self.defaults = sampling_defaults(loaded) if config.generation_config == "auto" else {}
        token_bytes = kv_bytes_per_token(model, config.kv_itemsize)
        memory = kv_memory(model, config, min(config.max_step_tokens or sys.maxsize, self.max_positions))
        if memory < token_bytes:
            raise InputError(f"kv_memory={config.kv_memory} is too small: a token takes {token_bytes} bytes")
        if config.runner == "packed" and memory < token_bytes * config.page_size:
            raise InputError(
                f"page_size={config.page_size} is too large: a page takes more than kv_memory, {memory} bytes"
            )
        try:
            self._build(config, memory, token_bytes)
        except InputError as error:
            if config.runner == "padded" or asked.must_pack:
                raise
            lost = "requests cannot join a running batch, and nothing is shared"
            warnings.warn(f"{error}; using runner='padded' and policy='dynamic': {lost}", stacklevel=2)
            config = replace(asked, runner="padded", policy="dynamic").resolve(*place)
            self._build(config, memory, token_bytes)
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng(config.seed)

    def _build(self, config: EngineConfig, memory: int, token_bytes: int) -> None:
        """Make what a resolved config says: runner, scheduler and the accounting of so many bytes of memory.

        Args:
            token_bytes: what the model's own cache takes for a token, in int8 at two bytes a number. (Pages
                hold what its attention is given, which may be more: some models compress what they keep.)
        """
        self.config = config
        self.runner = make_runner(self.model, config, memory, token_bytes)
        # The padded runner cuts its passes by itself.
        most = config.max_step_tokens if config.runner == "packed" else None
        limits = config.max_batch_size, most or sys.maxsize
        self.scheduler = Scheduler(config.policy, *limits, self.runner.memory)

    @classmethod
    def from_pretrained(
        cls, spec: str, config: EngineConfig | None = None, *, progress: bool = True
    ) -> Engine:
        """Load the model that `spec` names (hub id, folder, .gguf file, `smollm2`, `random:NAME`) and build
        on it.

        Raises:
            InputError: for an unknown or broken model, or a device that is not there.
        """
        config = _config(config)
        check("progress", progress, bool)
        device, dtype = placement(config.device, config.dtype)
        loaded = load(spec, device=device, dtype=dtype, seed=config.seed, progress=progress)
        with Progress(f"Preparing {spec}", shown=progress):  # the proof, and what is compiled once a machine
            return cls(loaded, config)

    def encode(self, prompt: Prompt, *, name: str = "prompt") -> list[int]:
        """Return a prompt's token ids, checked; `name` is what errors call it."""
        return self._input.encode(prompt, name)

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation in the model's chat template; see `InputProcessor.chat`."""
        return self._input.chat(messages)

    def room(self, prompt_tokens: int) -> int:
        """Return the most output tokens that a request with so long a prompt can ask for; 0: none."""
        return max(0, min(self.max_positions, self.scheduler.memory.capacity) - prompt_tokens + 1)

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
        if arrival is not None:
            arrival = check("arrival", arrival, float, -UNBOUNDED)
        request = self._make("prompt", prompt, _params("params", params), request_id, on_chunk)
        request.arrival = time.perf_counter() if arrival is None else arrival
        self._accept(request)
        self._queue(request)
        return request

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
            progress: show on standard error how far it is: a bar, if it takes longer than two seconds, or
                where that is no terminal a line every ten seconds.

        Returns:
            An output a prompt. A request that failed alone says so in its `finish_reason` and `error`. Ctrl-C
            ends the call early: unfinished requests have reason "abort" and the tokens they got.

        Raises:
            InputError: before any work, if any prompt or its parameters cannot be served; it says which.
        """
        listed: Any = [prompts] if isinstance(prompts, str) else prompts
        each = check_list("prompts", listed, "a list of texts or of lists of token ids")
        if params is None or isinstance(params, SamplingParams):
            many = [_params("params", params)] * len(each)
        else:
            given = check_list("params", params, "SamplingParams, or a list of them")
            many = [_params(f"params[{i}]", one) for i, one in enumerate(given)]
        if len(many) != len(each):
            raise InputError(
                f"params has {len(many)} entries for {len(each)} prompts: give one, or one for each"
            )
        return self.replay(list(map(WorkItem, each, many)), progress=progress)

    def replay(
        self,
        items: Sequence[WorkItem],
        *,
        progress: bool = True,
        on_step: Callable[[list[StreamChunk]], object] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for requests that are each due at a time of their own, `arrival_s` after now.

        An item that `follows` another is due after that one's answer has ended, and if it ended by an error
        or was aborted, ends like it. The longest that a conversation may become is checked before any work.

        `on_step` is called with the chunks of each step; text may come with a request's last alone.
        """
        check("progress", progress, bool)
        known, requests = checked_items(items), list[Request]()
        for i, item in enumerate(known):
            params, name, prompt = _params(f"params[{i}]", item.params), f"prompts[{i}]", item.prompt
            if item.follows is not None:
                own = self._input.encode(prompt, name, continues=True)
                prompt = longest_prompt(requests[item.follows], own)
                name += " with what it follows"
            requests.append(self._make(name, prompt, params, None, None))
        if not requests:
            raise InputError("prompts is empty: give at least one")
        for request in requests:
            self._accept(request)
        timetable = Timetable(requests, known, time.perf_counter())
        options: Any = dict(unit="requests", shown=progress, delay_s=BAR_AFTER_S)
        with Progress("generate", len(requests), **options) as bar:
            try:
                while any(request.result is None for request in requests):
                    for request in timetable.due(self._end):
                        self._queue(request)
                    if not self.has_work:
                        time.sleep(min(timetable.pause_s, NAP_S))
                    chunks = self.step()
                    bar.advance(sum(chunk.output is not None for chunk in chunks))
                    if on_step is not None:
                        on_step(chunks)
            except KeyboardInterrupt:
                bar.write("interrupted: unfinished requests end with reason 'abort'")
            finally:
                for request in requests:
                    self._end(request, FinishReason.ABORT)
        return [request.result for request in requests if request.result is not None]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Generate for one prompt and give its chunks as they come; leaving the loop early aborts the
        request.

        Several streams may be read in turn: whichever is read steps the engine for all.

        Raises:
            InputError: at the call, not at the first chunk.
        """
        chunks: deque[StreamChunk] = deque()
        drain = self._drain(self.add_request(prompt, params, on_chunk=chunks.append), chunks)
        next(drain)  # into its `try`, so that the request ends with the stream, even if nobody reads it
        return drain

    def _drain(self, request: Request, chunks: deque[StreamChunk]) -> Iterator[StreamChunk]:
        try:
            yield StreamChunk(request.id, (), "")  # for `stream` alone
            while request.result is None or chunks:
                while chunks:
                    yield chunks.popleft()
                if request.result is None:
                    self.step()
        finally:
            self._end(request, FinishReason.ABORT)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any state and give what it has; None if no unfinished request has this id."""
        request = self._requests.get(check_text("request_id", request_id))
        return self._end(request, FinishReason.ABORT) if request is not None else None

    def is_healthy(self) -> bool:
        """Return whether the engine can compute: whether a request of its own gets its token.

        What waits is held back, what runs goes on; the requests of steps that raise have ended.
        """
        held, self.scheduler.waiting = self.scheduler.waiting, deque()
        try:
            trial = self.add_request([0], SamplingParams(max_new_tokens=1, temperature=0, seed=0))
            for _ in range(len(self._requests)):  # each step that raises ends one of them at least
                try:
                    while trial.result is None:
                        self.step()
                except Exception as error:
                    LOG.warning("a step failed: %r", error)
            output = self._end(trial, FinishReason.ABORT)
        finally:
            self.scheduler.waiting.extend(request for request in held if request.result is None)
        return output is not None and output.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR)

    def _make(
        self, name: str, prompt: Prompt, params: SamplingParams, own_id: str | None, on_chunk: OnChunk
    ) -> Request:
        """A request that has passed every check; `name` is what errors call its prompt."""
        if on_chunk is not None and not callable(on_chunk):
            raise InputError(f"on_chunk={shown(on_chunk)} must be something to call with each chunk, or None")
        if own_id is None:
            names = (f"request-{number}" for number in self._numbers)
            own_id = next(free for free in names if free not in self._requests)
        elif not (own_id := check_text("request_id", own_id)) or own_id in self._requests:
            problem = "is that of an unfinished request: choose another" if own_id else "must not be empty"
            raise InputError(f"request_id={shown(own_id)} {problem}")
        tokens = self._input.encode(prompt, name)
        params = with_defaults(params, self.defaults, self.max_positions - len(tokens) + 1)
        self._input.check_positions(name, len(tokens), params.max_new_tokens)
        self._input.check_stop(params.stop)
        self._input.check_stop_ids(params.stop_token_ids)
        named = stop_tokens(self.tokenizer, params.stop) if params.stop and self.tokenizer is not None else {}
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        request = Request(own_id, len(tokens), params, tokens, stop_ids | named.keys(), on_chunk=on_chunk)
        request.stop_names = named
        self.scheduler.memory.check(request)
        if self.tokenizer is not None and (on_chunk is not None or params.stop):
            request.text = TextStream(self.tokenizer, params.stop)
        return request

    def _accept(self, request: Request) -> None:
        """Take a request: its id is its own until it ends. One that is refused draws no seed of others'."""
        seed = request.params.seed
        request.seed = int(self._seeds.integers(2**63)) if seed is None else seed
        self._requests[request.id] = request


def _config(config: EngineConfig | None) -> EngineConfig:
    """The config given, or the default one."""
    if config is not None:
        check_type("config", config, EngineConfig, "give EngineConfig(...)")
    return EngineConfig() if config is None else config


def _params(name: str, params: SamplingParams | None) -> SamplingParams:
    """The parameters given, or the default ones; `name` is what errors call them."""
    if params is not None:
        check_type(name, params, SamplingParams, "give SamplingParams(...)")
    return SamplingParams() if params is None else params
