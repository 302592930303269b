"""When the requests of a replay are due: at a time of their own, or after the answer that they follow.

A follow-up is checked before any work with zeros for the answer, as many as it may have: what is served fits.
Its prompt is known when that answer has ended. It queues nothing and computes nothing.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import check, check_list, check_type
from engine.request import FinishReason, Request, WorkItem, check_follows

End = Callable[[Request, FinishReason, str], object]


def checked_items(items: Any) -> list[WorkItem]:
    """Return the items of a replay, their times as floats; raise InputError for what is none."""
    listed = check_list("items", items, "a list of WorkItem, such as a workload's items")
    checked = []
    for i, item in enumerate(listed):
        check_type(f"items[{i}]", item, WorkItem, "give the prompt, its parameters and when it is due")
        checked.append(replace(item, arrival_s=check(f"items[{i}].arrival_s", item.arrival_s, float)))
    check_follows(checked)
    return checked


def longest_prompt(before: Request, own: Sequence[int]) -> list[int]:
    """Return a prompt as long as that of a follow-up may become: zeros stand for the answer before."""
    return [*before.tokens, *[0] * before.params.max_new_tokens, *own]


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A request that waits for an answer: where it stands among all, what is new in its prompt, and how many
    seconds after that answer it is due."""

    index: int
    request: Request
    own: list[int]
    after_s: float


class Timetable:
    """The requests of a replay that are not due yet.

    Args:
        requests: one for each item, nothing of it computed; a follow-up with its `longest_prompt`.
        items: when each is due, and after whom.
        start: `time.perf_counter` seconds that the items' times count from.
    """

    def __init__(self, requests: Sequence[Request], items: Sequence[WorkItem], start: float) -> None:
        self._known: list[tuple[float, int, Request]] = []  # a heap of those whose time is known
        self._waiting: dict[str, list[FollowUp]] = {}  # by the id of the request that they wait for
        self._ended: deque[Request] = deque()  # those that somebody waits for
        self._faults: dict[str, Request] = {}  # by the id of one that could not follow: who ended before it
        for index in reversed(range(len(requests))):  # while those before still have their longest prompts
            request, item = requests[index], items[index]
            if item.follows is None:
                request.arrival = start + item.arrival_s
                heapq.heappush(self._known, (request.arrival, index, request))
                continue
            before = requests[item.follows]
            before.on_end = self._ended.append
            own = request.tokens[before.max_len :]
            self._waiting.setdefault(before.id, []).append(FollowUp(index, request, own, item.arrival_s))
            request.arrival = math.inf
            request.set_prompt(own)

    def due(self, end: End) -> list[Request]:
        """Return the requests that have become due, each once and in their order.

        `end` is called for those that follow one that was aborted or failed: they end like it.
        """
        while self._ended:
            before = self._ended.popleft()
            for follow_up in self._waiting.pop(before.id):
                if follow_up.request.result is None:
                    self._follow(before, follow_up, end)
        now, found = time.perf_counter(), []
        while self._known and self._known[0][0] <= now:
            found.append(heapq.heappop(self._known)[2])
        return found

    def _follow(self, before: Request, follow_up: FollowUp, end: End) -> None:
        assert before.result is not None
        request, reason = follow_up.request, before.result.finish_reason
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            fault = self._faults[request.id] = self._faults.get(before.id, before)
            told = f"{fault.id}, which ended with reason {reason}" + (
                f": {fault.error}" if fault.error else ""
            )
            end(request, reason, f"{request.id} comes after {told}")
            return
        request.set_prompt([*before.tokens[: before.prompt_len], *before.shown_ids, *follow_up.own])
        request.arrival = before.result.metrics.finished_s + follow_up.after_s
        heapq.heappush(self._known, (request.arrival, follow_up.index, request))

    @property
    def pause_s(self) -> float:
        """Seconds until the next of those whose time is known; 0 if there is none."""
        return max(0.0, self._known[0][0] - time.perf_counter()) if self._known else 0.0
