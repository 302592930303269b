"""The backend `http`: whatever server is at `--target`, asked over the network as its users ask it."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from engine import EngineMetrics, RequestMetrics, WorkItem, cpu_name
from perf.backends import Checked, Judge, Outcome, Setup
from perf.backends.http import scrape
from perf.backends.http.connection import Connection, Exchange
from perf.backends.http.dialect import Dialect, find_model, negotiate, server_name
from perf.backends.http.load import Sent, send_all
from perf.backends.http.prompts import Prompts, RoundPrompts
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

    setup.options: `target`, a Target. At most `max_batch_size` requests are on their way at
    once where all are due at the start; those that come at times of their own are all sent.
    """

    in_process = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.target: Target = setup.options["target"]
        self._loop = asyncio.new_event_loop()
        self._connection: Connection | None = None
        self._prompts: Prompts | None = None
        self._dialect: Dialect | None = None
        self._round = self._void = 0
        self._early = False  # whether any request got fewer tokens than it asked for
        self._checked: Checked | None = None
        self._sent: list[Sent] = []
        self._server = "unknown"
        self._tokenizer: Any = setup.held.tokenizer if setup.held else None
        self.runner = "http"
        wait_until_ready(self.target, READY_S)
        try:
            self._connection = self._wait(self._connect())
            self.served_model = self.target.model or self._wait(find_model(self._connection))
        except BaseException:
            self.close()
            raise

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
        early = "some requests: it does not honour ignore_eos" if self._early else "no"
        return {
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "client": f"aiohttp {version('aiohttp')}",
            "served_model": self.served_model,
            **self._dialect.plain(),
            "ends_early": early,
        }

    def begin(self, items: Sequence[WorkItem]) -> RoundPrompts:
        """Agree with the server on how it is asked, once; return these requests as they are in this round."""
        if self._prompts is None or self._prompts.items is not items:
            self._prompts = Prompts(items, self._tokenizer, self.setup.seed)
        if self._dialect is None:
            kinds = self._prompts.kinds(self.target.api)
            self._dialect = self._wait(negotiate(self.connection, self.served_model, kinds))
            self._server = self._wait(server_name(self.connection))
        return RoundPrompts(self._prompts, self._dialect, self._round)

    def reset(self) -> None:
        """Begin another round: other prompts in the server's prefix cache's eyes."""
        self._round += 1

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        """Send every request when it is due, and wait for all.

        Raises:
            TargetError: if the server is gone, or the second round fails.
        """
        prompts = self.begin(items)
        at_once = not any(item.arrival_s for item in items if item.follows is None)
        places = self.setup.max_batch_size if at_once else None

        async def measure() -> tuple[list[Sent], dict[str, float]]:
            await self.connection.open(min(len(items), places or len(items)))
            before = await scrape.read(self.connection)
            sent = await send_all(self.connection, prompts, self._read, places)
            return sent, scrape.changes(before, await scrape.read(self.connection))

        self._sent, server = self._wait(measure())
        return self._outcome(items, self._sent, server)

    def _read(self, exchange: Exchange) -> Reply:
        if exchange.error is not None:
            return Reply(error=exchange.error)
        return read_reply(exchange.parts, None if self._tokenizer is None else self._count)

    def _count(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

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
            one.error is None and one.reply.tokens < item.params.resolved().max_new_tokens
            for item, one in zip(items, sent, strict=True)
        )
        self._early = self._early or early > 0
        extra: dict[str, Any] = {"send_lag_p99_ms": lag_ms, "ended_early": early, **server}
        counted = sorted({one.reply.counted_by for one in sent})
        extra |= {"tokens_counted_by": ", ".join(counted), "server": self._server}
        if names := [one.reply.system_fingerprint for one in sent if one.reply.system_fingerprint]:
            extra["system_fingerprint"] = names[0]
        tokens = [one.reply.token_ids or () for one in sent]
        return Outcome(tokens, metrics, extra=extra, voided=voided, exact=not early)

    def check(self, items: Sequence[WorkItem], judge: Judge | None) -> Checked:
        """Check the answers of the first round, once: another round asks for other tokens.

        With a model of ours and ids from the server, each is held against the model's own choice; else
        against what the server answers to the same request alone.
        """
        if self._checked is None:
            prompts = self.begin(items)
            replies = [one.reply for one in self._sent]
            if judge is not None and prompts.dialect.tells_ids and prompts.dialect.ids:
                self._checked = _by_model(prompts, replies, judge)
            else:
                self._checked = self._one_by_one(prompts, replies)
        return self._checked

    def _one_by_one(self, prompts: RoundPrompts, replies: Sequence[Reply]) -> Checked:
        path = prompts.dialect.path
        sample = np.linspace(0, len(replies) - 1, min(len(replies), CHECKED)).round().astype(int).tolist()

        async def again() -> list[Reply]:
            return [
                self._read(await self.connection.stream(path, prompts.body(index, replies)))
                for index in sample
            ]

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


def _by_model(prompts: RoundPrompts, replies: Sequence[Reply], judge: Judge) -> Checked:
    verdicts = [
        judge.judge(prompts.token_ids(index, replies), reply.token_ids or ())
        for index, reply in enumerate(replies)
    ]
    return Checked.by_model(verdicts)


def _answers(reply: Reply) -> object:
    return reply.text if reply.token_ids is None else reply.token_ids


def _record(name: str, item: WorkItem, sent: Sent, by_chunk: bool) -> RequestMetrics:
    """Return one request's metrics: a chunk may hold several tokens, and only the first and last times are
    surely of tokens."""
    reply, times = sent.reply, sent.reply.chunk_times
    by_times = RequestMetrics.from_times(
        name, prompt_tokens=reply.prompt_tokens or _length(item), arrival_s=sent.due_s, scheduled_s=None,
        token_times_s=times, finished_s=times[-1] if times else sent.exchange.sent_s,
        finish_reason="error" if sent.error else reply.finish_reason or "stop",
        prompt_tokens_cached=reply.cached_tokens or 0,
    )  # fmt: skip
    decode_ms = by_times.decode_ms
    return replace(
        by_times,
        output_tokens=reply.tokens,
        tpot_ms=decode_ms / (reply.tokens - 1) if decode_ms is not None and reply.tokens > 1 else None,
        itl_ms=by_times.itl_ms if by_chunk and reply.chunks_are_tokens else (),
    )


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
