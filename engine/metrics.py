"""A record of each request, exact counters, and their summaries: plain numbers, or pandas frames.

Times come from `time.perf_counter`, read when a token is on the host. A leaf: it knows no model and no
scheduler.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING

from engine.errors import check

if TYPE_CHECKING:
    import pandas as pd

    from engine.step import StepResult

LATENCIES = ["queue_ms", "ttft_ms", "prefill_ms", "decode_ms", "latency_ms", "tpot_ms", "itl_ms"]
STATISTICS = ("count", "mean", "std", "min", "50%", "95%", "99%", "max")  # of a latency, rows of its summary


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """One request's timeline, in milliseconds; None where an event never happened (aborted, a single token).

    queue_ms: due to first scheduled. ttft_ms: due to first token. prefill_ms: scheduled to first token.
    decode_ms: first token to finished. latency_ms: due to finished. tpot_ms: decode_ms / (output_tokens - 1).
    itl_ms: every gap between successive tokens. `arrival_s` and `finished_s` are `time.perf_counter` seconds.
    """

    request_id: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_cached: int
    preemptions: int
    arrival_s: float
    finished_s: float
    queue_ms: float | None
    ttft_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    latency_ms: float
    tpot_ms: float | None
    itl_ms: tuple[float, ...]

    @classmethod
    def from_times(
        cls, request_id: str, *, prompt_tokens: int, arrival_s: float, scheduled_s: float | None,
        token_times_s: Sequence[float], finished_s: float, finish_reason: str = "length",
        prompt_tokens_cached: int = 0, preemptions: int = 0,
    ) -> RequestMetrics:  # fmt: skip
        """Return the metrics of a request from when it was due, first ran, got each token and ended.

        Args:
            arrival_s, scheduled_s, token_times_s, finished_s: seconds of one clock; `scheduled_s` is None for
                a request that never ran, and there is a time for each output token.
        """
        first = token_times_s[0] if token_times_s else None
        decode_ms = _ms(first, finished_s)
        gaps = tuple((later - earlier) * 1e3 for earlier, later in pairwise(token_times_s))
        counts = prompt_tokens, len(token_times_s), prompt_tokens_cached, preemptions
        return cls(
            request_id, finish_reason, *counts, arrival_s, finished_s,
            queue_ms=_ms(arrival_s, scheduled_s),
            ttft_ms=_ms(arrival_s, first),
            prefill_ms=_ms(scheduled_s, first),
            decode_ms=decode_ms,
            latency_ms=(finished_s - arrival_s) * 1e3,
            tpot_ms=decode_ms / len(gaps) if decode_ms is not None and gaps else None,
            itl_ms=gaps,
        )  # fmt: skip

    def meets(self, ttft_ms: float, tpot_ms: float) -> bool:
        """Return whether the request ended by itself and within both limits; a single token has no TPOT."""
        ended = self.finish_reason in ("stop", "length")
        in_time = self.ttft_ms is not None and self.ttft_ms <= ttft_ms
        return ended and in_time and (self.tpot_ms or 0.0) <= tpot_ms


def _ms(begin_s: float | None, end_s: float | None) -> float | None:
    """Return the milliseconds between two times; None if one of them never came."""
    return None if begin_s is None or end_s is None else (end_s - begin_s) * 1e3


@dataclass(slots=True)
class Counters:
    """Exact, noise-free counts of work; `batch_sizes` counts steps by how many requests they advanced."""

    steps: int = 0
    forward_passes: int = 0
    tokens_computed: int = 0
    padded_tokens: int = 0
    prompt_tokens_cached: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    kv_bytes_peak: int = 0
    kv_unused_tokens: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)

    @property
    def requests_advanced(self) -> int:
        """Requests of each step, summed over all steps."""
        return sum(size * steps for size, steps in self.batch_sizes.items())

    @property
    def kv_unused_mean(self) -> float:
        """Positions of KV memory held without need, on average over the running requests of all steps."""
        return self.kv_unused_tokens / max(1, self.requests_advanced)

    @property
    def padding_ratio(self) -> float:
        """Share of all computed positions that were padding."""
        return self.padded_tokens / max(1, self.tokens_computed + self.padded_tokens)


class EngineMetrics:
    """Everything measured by one engine. It takes no more memory the longer the engine serves.

    Counters, totals, `wall_s` and `tokens_per_s` are of all requests that ended; `records`, and with them
    frames, percentiles and goodput, of the last ones.

    `step_s` is wall time inside `Engine.step`; `model_s` is the part of it from handing tensors to the model
    to holding sampled tokens on the host. The rest is the engine's own host work.

    Args:
        window: requests whose own metrics are kept, the last that ended; None: all.
    """

    def __init__(self, window: int | None = None) -> None:
        self.counters = Counters()
        self.records: deque[RequestMetrics] = deque(maxlen=window)
        self.requests = 0  # that ended
        self.finish_reasons: Counter[str] = Counter()  # of those
        self.prompt_tokens = 0
        self.tokens_delivered = 0
        self.step_s = 0.0
        self.model_s = 0.0
        self._first_arrival_s = math.inf
        self._last_finished_s = -math.inf

    def count_step(self, requests: int, result: StepResult, step_s: float, unused: int = 0) -> None:
        """Add a step of so many requests: its seconds, and the positions that they held without need."""
        counters = self.counters
        counters.steps += 1
        counters.forward_passes += result.forward_passes
        counters.tokens_computed += result.tokens_computed
        counters.padded_tokens += result.padded_tokens
        given = [choice for choice in result.choices if choice and choice.token is not None]
        counters.output_tokens += len(given)
        counters.kv_bytes_peak = max(counters.kv_bytes_peak, result.kv_bytes)
        counters.batch_sizes[requests] += 1
        counters.kv_unused_tokens += unused
        self.model_s += result.model_s
        self.step_s += step_s

    def add(self, record: RequestMetrics) -> None:
        """Add a request that has ended."""
        self.records.append(record)
        self.requests += 1
        self.finish_reasons[record.finish_reason] += 1
        self.prompt_tokens += record.prompt_tokens
        self.tokens_delivered += record.output_tokens
        self._first_arrival_s = min(self._first_arrival_s, record.arrival_s)
        self._last_finished_s = max(self._last_finished_s, record.finished_s)
        self.counters.preemptions += record.preemptions
        self.counters.prompt_tokens_cached += record.prompt_tokens_cached

    @property
    def wall_s(self) -> float:
        """From the first arrival to the last finish, seconds."""
        return self._last_finished_s - self._first_arrival_s if self.requests else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens delivered per second of `wall_s`; padding and whatever follows a stop never count."""
        wall_s = self.wall_s
        return self.tokens_delivered / wall_s if wall_s else 0.0

    @property
    def host_pct(self) -> float:
        """The engine's own host work, as a percentage of the time spent in steps."""
        return 100.0 * (1.0 - self.model_s / self.step_s) if self.step_s else 0.0

    def goodput(self, ttft_ms: float, tpot_ms: float) -> float:
        """Return requests per second that ended by themselves within both limits, of those kept.

        Args:
            ttft_ms, tpot_ms: milliseconds; `math.inf` is no limit.

        Raises:
            InputError: for a limit that is negative or no number.
        """
        ttft_ms = check("ttft_ms", ttft_ms, float, 0, math.inf)
        tpot_ms = check("tpot_ms", tpot_ms, float, 0, math.inf)
        if not self.records:
            return 0.0
        good = sum(record.meets(ttft_ms, tpot_ms) for record in self.records)
        first = min(record.arrival_s for record in self.records)
        wall_s = max(record.finished_s for record in self.records) - first
        return good / wall_s if wall_s > 0 else 0.0

    def frame(self) -> pd.DataFrame:
        """Return a row for each request kept, in the order they ended, of the fields of RequestMetrics."""
        import pandas as pd

        columns = [field.name for field in fields(RequestMetrics)]
        frame = pd.DataFrame([asdict(record) for record in self.records], columns=columns)
        return frame.astype(dict.fromkeys(LATENCIES[:-1], float))

    def latencies(self, name: str) -> list[float]:
        """Return the values of one of LATENCIES, in ms, of the requests kept that have it; itl_ms gives every
        gap of each."""
        if name == "itl_ms":
            return [gap for record in self.records for gap in record.itl_ms]
        found = (getattr(record, name) for record in self.records)
        return [value for value in found if value is not None]

    def summary(self) -> pd.DataFrame:
        """Return statistics (rows count, mean, std, min, 50%, 95%, 99%, max) of each latency, in ms.

        They are of the requests kept, and `count` says how many; itl_ms is over every gap of each.
        Percentiles are numpy's default (linear).
        """
        import pandas as pd

        return pd.DataFrame({name: _described(self.latencies(name)) for name in LATENCIES})

    def flat(self) -> dict[str, float | int | None]:
        """Return the run as plain numbers by flat names (`ttft_p95_ms`, `forward_passes`, ...), for JSON.

        There are no numpy scalars, and None stands where nothing was measured.
        """
        flat: dict[str, float | int | None] = {"requests": self.requests}
        flat |= {name: getattr(self, name) for name in ("wall_s", "tokens_per_s", "host_pct")}
        flat |= asdict(self.counters)
        del flat["batch_sizes"]
        flat |= {name: getattr(self.counters, name) for name in ("padding_ratio", "kv_unused_mean")}
        flat["batch_size_mean"] = self.counters.requests_advanced / max(1, self.counters.steps)
        for name in LATENCIES:
            short, found = name.removesuffix("_ms"), _described(self.latencies(name))
            for row, label in (("mean", "mean"), ("50%", "p50"), ("95%", "p95"), ("99%", "p99")):
                flat[f"{short}_{label}_ms"] = None if math.isnan(found[row]) else found[row]
        return flat


def _described(values: Sequence[float]) -> dict[str, float]:
    """Return the statistics of some values as pandas' `describe` does: NaN for those that they can't have."""
    import numpy as np  # here, for the command's help is shown without it

    if not values:
        return {"count": 0.0} | dict.fromkeys(STATISTICS[1:], math.nan)
    array = np.asarray(values)
    std = array.std(ddof=1) if len(values) > 1 else math.nan
    found = len(values), array.mean(), std, array.min(), *np.percentile(array, [50, 95, 99]), array.max()
    return dict(zip(STATISTICS, map(float, found), strict=True))
