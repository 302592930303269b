"""What passes between the loop, the runners and the backends in one step: a batch in, choices out. A leaf."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from engine.request import Request

PENDING = -1  # stands for a token that a device has chosen and the host has not seen


@dataclass(slots=True)  # not frozen: each step makes one a request, and that takes thrice as long
class Span:
    """The next tokens of one request: where they lie in the batch, how many precede them, and in which pages.

    `pages` has one for every page size of positions, in their order, up to the last of these tokens or
    beyond. `request` says whose they are to a backend that keeps something of a request from one step to the
    next.
    """

    begin: int
    end: int
    computed: int
    pages: list[int]
    request: Hashable = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of a step, all requests' in one row and without padding.

    Two requests, with pages of 4 positions. The first has a prompt of 6 tokens and computes the last 3 of
    them; the second has computed 8 tokens and computes its ninth. Each shall get its next token then, so the
    logits after the third and the fourth token of the batch are wanted:

    >>> first, second = Span(0, 3, computed=3, pages=[5, 2]), Span(3, 4, computed=8, pages=[0, 1, 7])
    >>> batch = Batch([40, 41, 42, 90], [first, second], wanted=[2, 3])
    >>> batch.positions
    [3, 4, 5, 8]

    Its tokens lie in the last place of page 5, the first two of page 2, and the first of page 7.

    Args:
        tokens: T ids; PENDING for one that only the device knows.
        spans: of the requests, one after the other. A page that one writes to is in no other's table.
        wanted: of the R tokens whose logits are wanted, their places in the batch, rising.
        requests: whose these are, R, for drawing their next tokens; not given where logits are all that is
            asked.
        position_ids: T numbers to rotate by instead of the tokens' places in their requests (for proofs).
    """

    tokens: list[int]
    spans: list[Span]
    wanted: list[int]
    requests: list[Request] = field(default_factory=list)
    position_ids: list[int] | None = None

    @property
    def positions(self) -> list[int]:
        """Each token's place in its request, T."""
        return [span.computed + at for span in self.spans for at in range(span.end - span.begin)]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log-probability and the most likely alternatives (id, log-probability), best first.

    Taken from the model's own logits, before penalties, temperature and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Choice(NamedTuple):
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


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Ticket(Protocol[T_co]):
    """A step that has been launched; where `is_async`, the next may be launched before `collect` waits for
    it.

    A runner's gives a StepResult, a backend's the choices for the wanted tokens of its batch.
    """

    @property
    def is_async(self) -> bool: ...

    def collect(self) -> T_co: ...


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The ticket of a step that is computed already."""

    result: T
    is_async: bool = False

    def collect(self) -> T:
        """Return the result, at once."""
        return self.result
