"""A request: what was asked for, its tokens, and how many of them are computed. No torch, no scheduling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import (
    UNBOUNDED,
    InputError,
    bounded,
    check,
    check_fields,
    check_list,
    check_text,
    plain,
    shown,
)
from engine.metrics import RequestMetrics
from engine.step import TokenLogprob

if TYPE_CHECKING:
    from engine.detokenizer import TextStream


class FinishReason(StrEnum):
    """Why a request ended: a stop condition of its own, its length limit, its caller, or an error of its
    own."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Raises InputError for a value out of bounds.

    None, the default of six fields, is what the model's generation_config says (see `EngineConfig`) or, if it
    says nothing, the value in brackets: without such a file a request is greedy.

    Args:
        max_new_tokens: output tokens at most, >= 1 [64].
        min_new_tokens: before there are this many, no stop token is drawn and no stop string ends the output.
            One that token number `min_new_tokens` or a later one completes does, wherever it began.
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn [0].
        top_k: draw among the k most likely tokens; 0 is all of them [0]. Here and elsewhere, of equally
            likely tokens the one with the lower id comes first.
        top_p: draw among the fewest tokens whose probabilities reach p (nucleus sampling; Holtzman et al.,
            2019) [1].
        min_p: drop tokens less likely than this fraction of the most likely one (Nguyen et al., 2024) [0].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen (CTRL; Keskar et
            al., 2019) [1].
        stop: strings that end the output and are left out of the text. Needs a tokenizer. A string that is a
            special token ("<|im_end|>"), which text does not show, is a stop token too, and then the
            `stop_reason` is the string.
        stop_token_ids: token ids that end the output, besides the model's EOS ids.
        ignore_eos: generate past the model's EOS ids.
        seed: makes this request's draws repeatable whatever shares its batch; None takes one from the
            engine's seed.
        logprobs: report each token's log-probability and this many of the most likely alternatives; None:
            nothing.
    """

    max_new_tokens: int | None = bounded(None, int, 1)
    min_new_tokens: int = 0
    temperature: float | None = bounded(None, float)
    top_k: int | None = bounded(None, int)
    top_p: float | None = bounded(None, float, 1e-9, 1)
    min_p: float | None = bounded(None, float, 0, 1)
    repetition_penalty: float | None = bounded(None, float, 1e-9)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = bounded(False, bool)
    seed: int | None = bounded(None, int, 0, 2**63 - 1)
    logprobs: int | None = bounded(None, int, 0, 100)

    def __post_init__(self) -> None:
        check_fields(self)
        least = check("min_new_tokens", self.min_new_tokens, int, 0, self.max_new_tokens or UNBOUNDED)
        object.__setattr__(self, "min_new_tokens", least)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            object.__setattr__(self, name, () if value is None else check_list(name, value, ordered=False))
        for text in self.stop:
            if not check_text("stop", text):
                raise InputError(f"stop={shown(self.stop)} must be strings that are not empty")
        tokens = tuple(check("stop_token_ids", token, int) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tokens)

    def resolved(self, defaults: Mapping[str, Any] = MappingProxyType({})) -> ResolvedParams:
        """With a value in every field: its own, else that of `defaults`, else the one of ResolvedParams."""
        values = ((known.name, getattr(self, known.name)) for known in fields(self))
        own = {name: value for name, value in values if value is not None}
        return ResolvedParams(**{**defaults, **own})


@dataclass(frozen=True, slots=True)
class ResolvedParams(SamplingParams):
    """SamplingParams that leave nothing to the model; as they are made by default, plain greedy decoding."""

    max_new_tokens: int = bounded(64, int, 1)
    temperature: float = bounded(0.0, float)
    top_k: int = bounded(0, int)
    top_p: float = bounded(1.0, float, 1e-9, 1)
    min_p: float = bounded(0.0, float, 0, 1)
    repetition_penalty: float = bounded(1.0, float, 1e-9)


@dataclass(frozen=True)
class WorkItem:
    """A request to come: what is asked, how to sample, and when it is due.

    Args:
        prompt: text or token ids. A follow-up has only what is new: its whole prompt is that of the item it
            follows, then that item's answer without the stop token that ended it, then this.
        arrival_s: when it is due, seconds after the start; a follow-up, seconds after the answer before.
        follows: index of the item whose answer it waits for, an earlier one; None: it waits for nobody.
        source: the text or the chat messages that the prompt was made from, for backends that speak text; of
            a follow-up only the new ones. None if it was made from neither.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    arrival_s: float = 0.0
    follows: int | None = None
    source: str | tuple[Mapping[str, str], ...] | None = None


def check_follows(items: Sequence[WorkItem]) -> None:
    """Raise InputError unless every follow-up follows an earlier item, so that no answer waits for itself."""
    for index, item in enumerate(items):
        before = plain(item.follows)
        is_index = isinstance(before, int) and not isinstance(before, bool)
        if before is not None and not (is_index and 0 <= before < index):
            problem = "must be the index of an earlier item, or None"
            raise InputError(f"items[{index}].follows={shown(item.follows)} {problem}")


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request gave. `text` is None without a tokenizer; `error` says why, where the reason is "error"
    or its conversation had ended before it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    error: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    metrics: RequestMetrics


class StreamChunk(NamedTuple):
    """What one step added to one request; `output` is set on its last chunk, `logprobs` where they were asked
    for."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    output: RequestOutput | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


OnChunk = Callable[[StreamChunk], object] | None


@dataclass(slots=True, eq=False)
class Request:
    """One request's state: its tokens (prompt, then output) and how many of them are computed.

    Prefill, decode, recomputation and a cache hit are one act, computing the next tokens, so no phase is
    kept.
    """

    id: str
    prompt_len: int
    params: ResolvedParams  # any SamplingParams will do
    tokens: list[int]
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    arrival: float = 0.0  # infinite while it waits for another's answer
    on_chunk: OnChunk = None
    on_end: Callable[[Request], object] | None = None  # called once, when it has its result
    text: TextStream | None = None
    stop_names: dict[int, str] = field(default_factory=dict)  # of stop ids that were asked for as strings
    computed: int = 0
    pending: int = 0  # tokens that are chosen, by an in-flight step, and not yet here
    prompt_tokens_cached: int = 0
    preemptions: int = 0
    scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stopped_by_token: bool = False  # the last one, which is no part of the text
    error: str | None = None
    result: RequestOutput | None = None
    max_len: int = field(init=False)  # the most tokens it can ever have
    max_positions: int = field(init=False)  # and of them computed: its last token is not fed back
    greedy: bool = field(init=False)  # it takes the likeliest token that it may have, and wants nothing else

    def __post_init__(self) -> None:
        params = self.params = self.params.resolved()
        self.greedy = params.temperature == 0 and params.repetition_penalty == 1.0 and params.logprobs is None
        self._set_bounds()

    def _set_bounds(self) -> None:
        self.max_len = self.prompt_len + self.params.max_new_tokens
        self.max_positions = self.max_len - 1

    def set_prompt(self, tokens: list[int]) -> None:
        """Take these tokens for its prompt, before any is computed."""
        self.tokens, self.prompt_len = tokens, len(tokens)
        self._set_bounds()

    @property
    def output_ids(self) -> list[int]:
        """The output tokens so far."""
        return self.tokens[self.prompt_len :]

    @property
    def shown_ids(self) -> list[int]:
        """The output tokens that are in the text: all but a stop token that ended it."""
        return self.output_ids[:-1] if self.stopped_by_token else self.output_ids

    @property
    def output_len(self) -> int:
        """How many output tokens there are so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that may not come next: those that would end it before `min_new_tokens`."""
        return self.stop_ids if self.output_len < self.params.min_new_tokens else frozenset()

    def append(self, token: int, now: float) -> None:
        """Take an output token that reached the host at `now` seconds; end on a stop token or the length
        limit."""
        self.tokens.append(token)
        self.token_times.append(now)
        if token in self.stop_ids and self.output_len >= self.params.min_new_tokens:
            self.stopped_by_token = True
            self.finish(FinishReason.STOP, self.stop_names.get(token, token))
        elif len(self.tokens) >= self.max_len:
            self.finish(FinishReason.LENGTH)

    def finish(
        self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        """Say why it ends; the last reason given holds (a stop string found in the last token allowed is a
        stop)."""
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def close(self, text: str | None, finished: float) -> RequestOutput:
        """Set and give `result`, for a request that has a reason and ended at `finished` seconds."""
        assert self.finish_reason is not None
        metrics = RequestMetrics.from_times(
            self.id,
            prompt_tokens=self.prompt_len,
            arrival_s=min(self.arrival, finished),  # one that ends before it is due has waited for nothing
            scheduled_s=self.scheduled,
            token_times_s=self.token_times,
            finished_s=finished,
            finish_reason=str(self.finish_reason),
            prompt_tokens_cached=self.prompt_tokens_cached,
            preemptions=self.preemptions,
        )
        logprobs = tuple(self.logprobs) if self.params.logprobs is not None else None
        prompt, output = tuple(self.tokens[: self.prompt_len]), tuple(self.output_ids)
        reasons = (self.finish_reason, self.stop_reason, self.error)
        self.result = RequestOutput(self.id, prompt, output, text, *reasons, logprobs, metrics)
        return self.result
