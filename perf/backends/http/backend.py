"""The backend `http`: whatever server is at `--target`, asked over the network as its users ask it."""

from __future__ import annotations

import asyncio
import itertools
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from engine import EngineMetrics, RequestMetrics, WorkItem, cpu_name
from perf.backends import Checked, Judge, Outcome, Setup
from perf.backends.http import scrape
from perf.backends.http.connection import Connection, Exchange
from perf.backends.http.dialect import Dialect, find_model, identity, negotiate
from perf.backends.http.load import Due, Sent, send_all
from perf.backends.http.prompts import Prompts
from perf.backends.http.reply import Reply, read_reply
from perf.servers.ready import TargetError, wait_until_ready
from perf.servers.target import Target

READY_S = 600.0
LATE_MS = 5.0  # a round whose P99 of the send lag is above that measured the client
CHECKED = 16  # requests that are asked again, one by one
MOST_VOID = 2  # rounds with a failed request, after which nothing is measured
CHUNKS = 0.9  # of the requests whose chunks are tokens, for ITL to be the server's


class HttpSession:
    """A server, agreed with on how it is asked.

    setup.options: `target` (a Target), and `ready_s`. At most `max_batch_size` requests are on their way at
    once where all are due at the start; those that come at times of their own are all sent.
    """

    in_process = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.target: Target = setup.options["target"]
        self._loop = asyncio.new_event_loop()
        self._connection: Connection | None = None
        self._dialect: Dialect | None = None
        self._round = self._void = 0
        self._early = False  # whether any request got fewer tokens than it asked for
        self._checked: Checked | None = None
        self._prompts: Prompts | None = None
        self._sent: list[Sent] = []
        self.identity: dict[str, str] = {}
        wait_until_ready(self.target, float(setup.options.get("ready_s", READY_S)))
        try:
            self._connection = self._wait(self._connect())
            self.served_model = self.target.model or self._wait(find_model(self._connection))
        except BaseException:
            self.close()
            raise
        self.runner = "http"

    async def _connect(self) -> Connection:
        return Connection(self.target)

    def _wait(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    @property
    def fingerprint(self) -> Mapping[str, str | None]:
        """What the times depend on besides the server: the client's machine, and how the server is asked."""
        assert self._dialect is not None
        about = {
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "client": f"aiohttp {version('aiohttp')}",
        }
        early = "some requests: it does not honour ignore_eos" if self._early else "no"
        return {
            **about, "served_model": self.served_model, **self._dialect.plain(), "ends_early": early
        }  # fmt: skip

    def begin(self, items: Sequence[WorkItem]) -> Dialect:
        """Agree with the server on how these requests are asked, once; connections are open then."""
        if self._dialect is None:
            tokenizer = self.setup.held.tokenizer if self.setup.held else None
            self._prompts = Prompts(items, tokenizer, self.setup.seed)
            self._dialect = self._wait(self._agree(self._prompts))
        return self._dialect

    async def _agree(self, prompts: Prompts) -> Dialect:
        dialect = await negotiate(self.connection, self.served_model, prompts.kinds(self.target.api))
        exchange = await self.connection.stream(dialect.path, dialect.body(prompts.trial(dialect), 1))
        self.identity = await identity(self.connection, read_reply(exchange.parts).system_fingerprint)
        return dialect

    def reset(self) -> None:
        """Begin another round: other prompts in the server's prefix cache's eyes."""
        self._round += 1

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Send every request when it is due, and wait for all.

        Raises:
            TargetError: if the server is gone, or the second round fails.
        """
        dialect = self.begin(items)
        assert self._prompts is not None
        prompts = self._prompts.of_round(self._round, dialect)
        due = [Due(item.arrival_s, item.follows) for item in items]
        at_once = not any(item.arrival_s for item in items if item.follows is None)

        def body(index: int, ended: Sequence[Sent | None]) -> bytes:
            prompt = prompts.whole(index, [sent.reply if sent else None for sent in ended])
            return dialect.body(prompt, _most_tokens(items[index]))

        async def measure() -> tuple[list[Sent], dict[str, float]]:
            places = self.setup.max_batch_size if at_once else None
            await self.connection.open(min(len(items), places or len(items)))
            before = await scrape.read(self.connection)
            sent = await send_all(self.connection, dialect.path, due, body, self._read, places)
            return sent, scrape.changes(before, await scrape.read(self.connection))

        self._sent, server = self._wait(measure())
        return self._outcome(items, self._sent, server)

    def _read(self, exchange: Exchange) -> Reply:
        if exchange.error is not None:
            return Reply(error=exchange.error)
        return read_reply(exchange.parts, self._prompts.tokenize if self._prompts else None)

    def _outcome(
        self, items: Sequence[WorkItem], sent: Sequence[Sent], server: Mapping[str, float]
    ) -> Outcome:
        failed = [(index, one.error) for index, one in enumerate(sent) if one.error is not None]
        voided = f"requests[{failed[0][0]}] of {len(sent)} {failed[0][1]}" if failed else None
        lag_ms = float(np.percentile([one.lag_ms for one in sent], 99))
        if voided is not None:
            self._void += 1
            if len(failed) == len(sent) or self._void >= MOST_VOID:
                rounds = f"{self._void} rounds failed: " if self._void > 1 else ""
                raise TargetError(f"{self.target.url}: {rounds}{voided}")
        elif lag_ms > LATE_MS:
            voided = f"requests were sent late (P99 {lag_ms:.1f} ms): this machine was too busy to send them"
        metrics = EngineMetrics()
        by_chunk = sum(one.reply.chunks_are_tokens for one in sent) >= CHUNKS * len(sent)
        for index, (item, one) in enumerate(zip(items, sent, strict=True)):
            metrics.add(_record(f"request-{index}", item, one, by_chunk))
        metrics.counters.output_tokens = sum(one.reply.tokens for one in sent)
        early = sum(
            one.error is None and one.reply.tokens < _most_tokens(item)
            for item, one in zip(items, sent, strict=True)
        )
        self._early = self._early or early > 0
        extra: dict[str, Any] = {"send_lag_p99_ms": lag_ms, "ended_early": early, **server}
        counted = sorted({one.reply.counted_by for one in sent})
        extra |= {"tokens_counted_by": ", ".join(counted), "server": self.identity.get("server", "unknown")}
        tokens = [one.reply.token_ids or () for one in sent]
        return Outcome(tokens, metrics, extra=extra, voided=voided, exact=not early)

    def check(self, items: Sequence[WorkItem], judge: Judge | None) -> Checked:
        """Check the answers of the first round, once: another round asks for other tokens.

        With a model of ours and ids from the server, each is held against the model's own choice; else
        against what the server answers to the same request alone.
        """
        if self._checked is None:
            dialect = self.begin(items)
            by_model = judge is not None and dialect.tells_ids and dialect.ids
            self._checked = self._by_model(items, judge) if by_model else self._one_by_one(items)
        return self._checked

    def _by_model(self, items: Sequence[WorkItem], judge: Judge | None) -> Checked:
        assert judge is not None
        assert self._prompts is not None
        prompts = self._prompts.of_round(self._round, self.begin(items))
        replies = [one.reply for one in self._sent]
        verdicts = [
            judge.judge(prompts.token_ids(index, replies), reply.token_ids or ())
            for index, reply in enumerate(replies)
        ]
        same = sum(verdict.same for verdict in verdicts)
        ties = sum(verdict.ties > 0 and verdict.wrong_at is None for verdict in verdicts)
        return Checked(same, ties, len(verdicts), "the model's own choices")

    def _one_by_one(self, items: Sequence[WorkItem]) -> Checked:
        dialect = self.begin(items)
        assert self._prompts is not None
        prompts = self._prompts.of_round(self._round, dialect)
        replies = [one.reply for one in self._sent]
        sample = np.linspace(0, len(items) - 1, min(len(items), CHECKED)).round().astype(int).tolist()

        async def again() -> list[Reply]:
            found = []
            for index in sample:
                body = dialect.body(prompts.whole(index, replies), _most_tokens(items[index]))
                found.append(self._read(await self.connection.stream(dialect.path, body)))
            return found

        alone = self._wait(again())
        for index, reply in zip(sample, alone, strict=True):
            if reply.error is not None:
                raise TargetError(f"{self.target.url}: requests[{index}], asked alone, {reply.error}")
        same = sum(_answers(replies[i]) == _answers(one) for i, one in zip(sample, alone, strict=True))
        return Checked(same, 0, len(sample), "the server's answers one by one")

    def close(self) -> None:
        """Close the connections; the server goes on."""
        if self._connection is not None:
            self._wait(self._connection.close())
        self._loop.close()


def _most_tokens(item: WorkItem) -> int:
    return item.params.resolved().max_new_tokens


def _answers(reply: Reply) -> object:
    return reply.text if reply.token_ids is None else reply.token_ids


def _record(name: str, item: WorkItem, sent: Sent, by_chunk: bool) -> RequestMetrics:
    """Return one request's metrics; of a failed one only that it failed."""
    reply = sent.reply
    times = reply.chunk_times
    first, last = (times[0], times[-1]) if times else (None, sent.exchange.sent_s)
    decode_ms = (last - first) * 1e3 if first is not None else None
    gaps = tuple((b - a) * 1e3 for a, b in itertools.pairwise(times))
    return RequestMetrics(
        name, "error" if sent.error else reply.finish_reason or "stop",
        prompt_tokens=reply.prompt_tokens or _length(item), output_tokens=reply.tokens,
        prompt_tokens_cached=reply.cached_tokens or 0, preemptions=0,
        arrival_s=sent.due_s, finished_s=last, queue_ms=None,
        ttft_ms=(first - sent.due_s) * 1e3 if first is not None else None,
        prefill_ms=None, decode_ms=decode_ms, latency_ms=(last - sent.due_s) * 1e3,
        tpot_ms=decode_ms / (reply.tokens - 1) if decode_ms is not None and reply.tokens > 1 else None,
        itl_ms=gaps if by_chunk and reply.chunks_are_tokens else (),
    )  # fmt: skip


def _length(item: WorkItem) -> int:
    return 0 if isinstance(item.prompt, str) else len(item.prompt)


class Http:
    """Any server that speaks OpenAI's API."""

    name = policy = "http"
    exact = False  # its kernels are its own: tokens are compared and counted, and fail nothing
    remote = True  # needs no model in this process
    conversations = True

    def missing(self, device: str) -> str | None:
        """Return what it lacks: the HTTP client, which is an extra."""
        return None if find_spec("aiohttp") else "pip install 'dynamic-batch[http]'"

    def open(self, setup: Setup) -> HttpSession:
        """Wait until the server is ready. Raises TargetError if it is not there."""
        if not isinstance(setup.options.get("target"), Target):
            raise TargetError("the backend http needs a server: give --target http://127.0.0.1:8000")
        return HttpSession(setup)
