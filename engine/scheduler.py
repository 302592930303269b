"""Which tokens are computed next. Pure Python, no torch.

A request is its tokens and how many of them are computed; a step is a list of `(request, n)`: compute the
next n tokens of that request. Prefill, decode, recomputation and cache hits are one act, so nothing here
knows a phase (after vLLM's V1 scheduler). Policies differ only in when a waiting request is admitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from engine.kv_pool import PagePool, RowPool
from engine.request import Request

Step = list[tuple[Request, int]]


class Scheduler:
    """Plans steps, first come first served.

    Args:
        policy: "sequential" admits one request when none runs, "dynamic" a batch when none runs, "continuous"
            at every step.
        max_batch_size: requests that run together at most.
        max_step_tokens: tokens of a step at most. A request that needs one token (all that decode) goes
            before any that need more, and these share what is left in order of arrival.
        memory: the KV accounting. When a running request finds no room, the youngest is preempted: it loses
            its pages, keeps its tokens and is computed again when there is room.
    """

    def __init__(
        self, policy: str, max_batch_size: int, max_step_tokens: int, memory: PagePool | RowPool
    ) -> None:
        self.continuous = policy == "continuous"
        self.max_running = 1 if policy == "sequential" else max_batch_size
        self.max_step_tokens = max_step_tokens
        self.memory = memory
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order admitted: the last is the youngest

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request that has passed `memory.check`."""
        self.waiting.append(request)

    def plan(self, now: float) -> Step:
        """The next step; `now` (seconds) becomes the `scheduled` time of the requests it admits.

        Empty without work, and when a lone request has just been preempted.
        """
        fresh, waiting_before = not self.running, len(self.waiting)
        step: Step = []
        left = self.max_step_tokens
        wants = _wanted(self.running)
        spare = max(0, left - wants.count(1))  # for more than one token
        at, running, reserve = 0, self.running, self.memory.reserve
        # Whoever was preempted just now would only be preempted again, so nobody is admitted then.
        while at < len(running) or (
            (fresh or (self.continuous and spare and len(self.waiting) <= waiting_before))
            and self._admit(now)
        ):
            request = running[at]
            wanted = wants[at] if at < len(wants) else _wanted([request])[0]  # who leaves, leaves at the end
            room = left if wanted <= 1 or left < spare else spare
            count = wanted if wanted < room else room
            tokens = request.computed + count
            if count and (reserve(request, tokens) or self._make_room(request, tokens)):
                step.append((request, count))
                left -= count
                spare -= count if wanted > 1 else 0
            at += 1
        return step

    def _admit(self, now: float) -> bool:
        """Start the next waiting request, if there is one and the batch size and the memory allow it."""
        if (
            not self.waiting
            or len(self.running) >= self.max_running
            or not self.memory.admit(self.waiting[0])
        ):
            return False
        request = self.waiting.popleft()
        if request.scheduled is None:
            request.scheduled = now
            request.prompt_tokens_cached = request.computed
        self.running.append(request)
        return True

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Reserve memory, preempting younger requests for it, and the request itself if it is the
        youngest."""
        while not self.memory.reserve(request, tokens):
            victim = self.running.pop()
            self.memory.release(victim)
            victim.computed = 0
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def shrink(self, step: Step) -> bool:
        """After this step ran out of memory: plan half as many tokens from now on; False if that cannot
        be."""
        tokens = sum(count for _, count in step)
        # rows are laid out as a whole, and cannot be fewer
        if tokens < 2 or not isinstance(self.memory, PagePool):
            return False
        self.max_step_tokens = tokens // 2
        return True

    def parts(self, step: Step) -> list[Step]:
        """The halves of a step that failed, to find out whose fault it is; none if it cannot be divided."""
        if len(step) < 2 or not isinstance(self.memory, PagePool):  # rows are computed together
            return []
        middle = len(step) // 2
        return [step[:middle], step[middle:]]

    @property
    def may_preempt(self) -> bool:
        """Whether the next plan might have to: each running request may need a page more than it has."""
        memory = self.memory
        return isinstance(memory, PagePool) and memory.pages - memory.pages_used < len(self.running)

    def advance(self, step: Step) -> None:
        """Take an in-flight step as computed; the tokens it chooses are pending until `commit`."""
        for request, count in step:
            computed = request.computed = request.computed + count
            if computed == len(request.tokens) + request.pending:
                request.pending += 1

    def commit(self, step: Step, tokens: Sequence[int | None], now: float) -> None:
        """Hand each request of a step that has been computed its next token, which reached the host at `now`
        seconds.

        `tokens` has one entry a request of the step, None where it has no token. A request that ended since
        the plan is passed over; one that ends by this token has its `finish_reason` set, and is let go by
        `release`.
        """
        cache_full_pages = self.memory.cache_full_pages
        for (request, _), token in zip(step, tokens, strict=True):
            if request.finish_reason is None:
                if token is not None:
                    request.pending -= 1
                    request.append(token, now)
                cache_full_pages(request)

    def release(self, request: Request) -> None:
        """Let a request go, wherever it is: its place and its memory are free for the next plan."""
        if request in self.running:
            self.running.remove(request)
            self.memory.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)


def _wanted(requests: list[Request]) -> list[int]:
    """Tokens that each has to compute, pending ones included; none where all it may ever have are chosen."""
    return [
        0 if r.pending and len(r.tokens) + r.pending >= r.max_len else len(r.tokens) + r.pending - r.computed
        for r in requests
    ]
