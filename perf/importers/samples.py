"""A round's sample: from the records of its requests, by numpy's percentile as everywhere in this project, or
where a file has none of them from what its tool summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from perf.gate.entries import Scalar
from perf.gate.metrics import GATED
from perf.gate.pooling import Sample
from perf.importers.fields import Fields
from perf.importers.loads import COARSE, refuse_empty

Shown = dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class Request:
    """A request that ended well, in ms and tokens.

    tpot_ms: None where it gave a single token. gaps_ms: between its chunks; None where the tool has no time
    of each.
    """

    ttft_ms: float
    latency_ms: float
    tpot_ms: float | None
    output_tokens: int
    gaps_ms: Sequence[float] | None = None


def sampled(
    found: Fields, requests: Sequence[Request], seconds: float, stated: tuple[int, int]
) -> tuple[Sample, Shown, tuple[str, ...]]:
    """Return the gated metrics of a round, the other numbers that are shown of it, and a note on its gaps.

    `stated` are the requests and the output tokens that the tool counted.

    Raises:
        GateError: if nothing was measured, the records are of other counts, or a request gave no token.
    """
    refuse_empty(found, *stated)
    tokens = sum(request.output_tokens for request in requests)
    if (len(requests), tokens) != stated:
        other = f"{len(requests)} requests with {tokens} output tokens"
        raise found.refuse(
            f"its records are of {other}, its summary of {stated[0]} with {stated[1]}: it is not whole"
        )
    if silent := sum(not request.output_tokens for request in requests):
        raise found.refuse(
            f"{silent} of {len(requests)} requests gave no token: mend that, and run the tool again"
        )
    ttfts = [request.ttft_ms for request in requests]
    latencies = [request.latency_ms for request in requests]
    tpots = [request.tpot_ms for request in requests if request.tpot_ms is not None]
    sample: Sample = {"tokens_per_s": tokens / _above_0(found, seconds), "ttft_p50_ms": _at(ttfts, 50)}
    sample |= {"ttft_p95_ms": _at(ttfts, 95), "latency_p95_ms": _at(latencies, 95)}
    shown: Shown = {"wall_s": seconds, "output_tokens": tokens}
    for name, values in (("ttft", ttfts), ("latency", latencies), ("tpot", tpots)):
        if values:
            shown |= {f"{name}_mean_ms": float(np.mean(values)), f"{name}_p99_ms": _at(values, 99)}
    shown["latency_p50_ms"] = _at(latencies, 50)
    if tpots:
        sample |= {"tpot_p50_ms": _at(tpots, 50), "tpot_p95_ms": tpots}
    coarse = sum(one.gaps_ms is not None and len(one.gaps_ms) + 1 < one.output_tokens for one in requests)
    if coarse:
        return sample, shown, (COARSE.format(coarse, len(requests)),)
    if gaps := list(chain.from_iterable(request.gaps_ms or () for request in requests)):
        sample["itl_p99_ms"] = gaps
        shown |= {"itl_p50_ms": _at(gaps, 50), "itl_p95_ms": _at(gaps, 95)}
    return sample, shown, ()


def summed_up(found: Fields, ours: Mapping[str, str], seconds: float) -> tuple[Sample, Shown]:
    """Return what `sampled` does as far as a tool's summary has it; `ours` is our name by the tool's.

    Which percentiles a summary has is an option of some tools: what it does not state is not recorded. All
    have tokens/s.

    Raises:
        GateError: for a value that is no number of 0 or more.
    """
    always = "tokens_per_s"
    known = {name: found.number(key) for key, name in ours.items() if key in found or name == always}
    sample = {name: value for name, value in known.items() if name in GATED and name != "output_tokens"}
    return sample, {"wall_s": _above_0(found, seconds), **{k: v for k, v in known.items() if k not in sample}}


def _above_0(found: Fields, seconds: float) -> float:
    if not seconds:
        raise found.refuse("took 0 s: the tool's clock stood still")
    return seconds


def _at(values: Sequence[float], percentile: float) -> float:
    return float(np.percentile(values, percentile))
