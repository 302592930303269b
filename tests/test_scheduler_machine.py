"""The scheduler under any requests, steps and aborts, over real page accounting and a fake runner: no token
is lost, no page leaked, nobody starves."""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import InputError
from engine.kv_pool import PagePool
from engine.request import FinishReason, Request
from engine.scheduler import Scheduler, Step
from tests.test_scheduler import POLICIES, request_of


def next_token(tokens: list[int]) -> int:
    """What the fake model says after these tokens: 0 to 3."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 1009
    return value % 4


class FakeRunner:
    """Writes each token's whole prefix where its key and value would go, and reads the past back from
    there."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.store: dict[tuple[int, int], tuple[int, ...]] = {}
        self.pending: dict[Request, list[int]] = {}  # tokens that are chosen and not committed

    def tokens(self, request: Request) -> tuple[int, ...]:
        return (*request.tokens, *self.pending.get(request, ()))

    def run(self, step: Step) -> list[int | None]:
        size = self.pool.page_size
        for request, count in step:
            table = self.pool.tables[request]
            assert len(table) * size >= request.computed + count, "a planned request lacks pages"
            for at in range(request.computed, request.computed + count):
                self.store[table[at // size], at % size] = self.tokens(request)[: at + 1]
        for request, count in step:
            table = self.pool.tables[request]
            for at in range(request.computed + count):
                assert self.store[table[at // size], at % size] == self.tokens(request)[: at + 1], (
                    "not its own past"
                )
        known = [(r, self.tokens(r), n) for r, n in step]
        chosen = [next_token(tokens) if r.computed + n == len(tokens) else None for r, tokens, n in known]
        for (request, _), token in zip(step, chosen, strict=True):
            if token is not None:
                self.pending.setdefault(request, []).append(token)
        return chosen


def alone(request: Request) -> list[int]:
    """The output tokens of this request without any scheduler."""
    tokens = list(request.tokens[: request.prompt_len])
    while len(tokens) < request.max_len:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_ids:
            break
    return tokens[request.prompt_len :]


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, steps and aborts over a pool so small that pages run out."""

    is_async = False  # whether a step is planned before the tokens of the one before are known

    @initialize(
        policy=st.sampled_from(POLICIES),
        caching=st.booleans(),
        pages=st.integers(2, 10),
        page_size=st.integers(1, 4),
        batch_size=st.integers(1, 5),
        step_tokens=st.integers(1, 12),
    )
    def start(self, policy, caching, pages, page_size, batch_size, step_tokens):
        self.pool = PagePool(pages, page_size, caching)
        self.scheduler = Scheduler(policy, batch_size, step_tokens, self.pool)
        self.runner = FakeRunner(self.pool)
        self.alive: list[Request] = []
        self.in_flight: deque[tuple[Step, list[int | None]]] = deque()
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        limit=st.integers(1, 6),
        stop=st.sampled_from([frozenset(), frozenset({3}), frozenset({0, 2})]),
    )
    def add(self, prompt, limit, stop):
        request = request_of(self.count, prompt, limit, stop)
        self.count += 1
        try:
            self.pool.check(request)
        except InputError:
            assert request.max_len > self.pool.page_size * len(self.pool._references)
        else:
            self.scheduler.add(request)
            self.alive.append(request)

    @rule(times=st.integers(1, 3))
    def step(self, times):
        for _ in range(times):
            self._step()

    def _step(self) -> None:
        scheduler = self.scheduler
        if scheduler.may_preempt and self.in_flight:
            self._read()
        waiting, preemptions = list(scheduler.waiting), sum(r.preemptions for r in self.alive)
        step = scheduler.plan(1.0)
        assert all(count >= 1 for _, count in step)
        assert sum(count for _, count in step) <= scheduler.max_step_tokens
        assert len({id(request) for request, _ in step}) == len(step)
        assert all(request in scheduler.running for request, _ in step)
        assert bool(step) <= bool(self.alive)
        assert (
            step or self.in_flight or not self.alive or sum(r.preemptions for r in self.alive) > preemptions
        )
        admitted = [request for request in waiting if request in scheduler.running]
        assert admitted == waiting[: len(admitted)], "first come, first admitted"
        if step:
            self.in_flight.append((step, self.runner.run(step)))
            scheduler.advance(step)
        while len(self.in_flight) > bool(self.is_async and step):
            self._read()

    def _read(self) -> None:
        scheduler = self.scheduler
        step, tokens = self.in_flight.popleft()
        scheduler.commit(step, tokens, 2.0)
        for (request, _), token in zip(step, tokens, strict=True):
            if token is not None:
                self.runner.pending[request].pop(0)
            if request.finish_reason is not None and request in self.alive:
                scheduler.release(request)
                self.alive.remove(request)
                assert request.output_ids == alone(request)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        request = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        request.finish(FinishReason.ABORT)
        self.scheduler.release(request)
        assert request.output_ids == alone(request)[: request.output_len]

    @invariant()
    def nothing_leaks(self):
        if not hasattr(self, "pool"):
            return
        pool, scheduler = self.pool, self.scheduler
        pool.check_integrity()
        assert len(scheduler.running) <= scheduler.max_running
        assert set(pool.tables) == set(scheduler.running)
        assert all(request.computed == 0 for request in scheduler.waiting)
        assert sorted(map(id, self.alive)) == sorted(map(id, [*scheduler.running, *scheduler.waiting]))
        owners = Counter(page for table in pool.tables.values() for page in table)
        for request, table in pool.tables.items():
            whole = table[: request.computed // pool.page_size] if pool.prefix_caching else []
            assert all(owners[page] == 1 for page in table if page not in whole), (
                "an unfinished page is shared"
            )

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for _ in range(4 * sum(request.max_len for request in self.alive) + 1):
            if not self.scheduler.has_work and not self.in_flight:
                break
            self._step()
        assert not self.scheduler.has_work, "somebody starves"
        assert not self.alive
        assert self.pool.pages_used == 0
        self.pool.check_integrity()


class LateMachine(SchedulerMachine):
    """The same, with tokens that arrive while the next step is in flight."""

    is_async = True


def sized(factor: int) -> settings:
    """Settings for many short runs, which are cheap: so many times as many as of other examples."""
    examples = factor * settings().max_examples
    return settings(max_examples=examples, stateful_step_count=25, suppress_health_check=list(HealthCheck))


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = sized(10)
TestLateMachine = LateMachine.TestCase
TestLateMachine.settings = sized(5)
