"""What passes between the loop, the runners and the backends in one step: spans in, choices out. A leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """The next tokens of one request: where they lie in the step, how many precede them, and the request's
    pages."""

    begin: int
    end: int
    computed: int
    pages: list[int]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log-probability and the most likely alternatives (id, log-probability), best first.

    Taken from the model's own logits, before penalties, temperature and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """A request's next token; or None and the reason why it has none."""

    token: int | None
    error: str | None = None
    logprob: TokenLogprob | None = None


NON_FINITE = Choice(None, error="the model gave logits that are NaN or infinite")
ALL_BANNED = Choice(
    None, error="min_new_tokens bars every token the model allows: lower it, or name fewer stops"
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What running a step gave and what it cost.

    `choices` has one entry a request of the step, in its order: None where more of its tokens must be
    computed first. `tokens_computed` counts useful positions, `padded_tokens` the others. `model_s` is the
    time from handing tensors to the model to holding the sampled tokens on the host (seconds), `kv_bytes` the
    KV memory that requests hold.
    """

    choices: list[Choice | None]
    forward_passes: int
    tokens_computed: int
    padded_tokens: int
    model_s: float
    kv_bytes: int


class Ticket(Protocol):
    """A step that has been launched; if `late`, the next may be launched before `collect`, which waits for
    this one."""

    @property
    def is_async(self) -> bool: ...

    def collect(self) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class Done:
    """The ticket of a step that is computed already."""

    result: StepResult
    is_async: bool = False

    def collect(self) -> StepResult:
        """The result, at once."""
        return self.result
