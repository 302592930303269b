"""Records that `vllm bench` and sglang's bench_serving share, one having begun as a copy of the other: TTFTs,
gaps, output tokens and errors of the requests, in lists side by side."""

from __future__ import annotations

from perf.importers.fields import Fields
from perf.importers.loads import refuse_failed
from perf.importers.samples import Request

SUMMARIES = {
    "output_throughput": "tokens_per_s",
    "median_ttft_ms": "ttft_p50_ms",
    "p95_ttft_ms": "ttft_p95_ms",
    "median_tpot_ms": "tpot_p50_ms",
    "total_output_tokens": "output_tokens",
    "mean_ttft_ms": "ttft_mean_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "mean_tpot_ms": "tpot_mean_ms",
    "p99_tpot_ms": "tpot_p99_ms",
}
LATENCIES = {"p95": "p95", "mean": "mean", "median": "p50", "p99": "p99"}  # ours by theirs
LISTS = ("ttfts", "itls", "output_lens", "errors")


def summaries(latency: str) -> dict[str, str]:
    """Return our names of what they sum up, by theirs; `latency` is how the tool calls that of a request."""
    return SUMMARIES | {f"{theirs}_{latency}_ms": f"latency_{ours}_ms" for theirs, ours in LATENCIES.items()}


def requests_of(found: Fields) -> list[Request]:
    """Return the requests of the lists. Each ends with its last chunk: after TTFT and all its gaps.

    Raises:
        GateError: if lists are missing or of several lengths, or a request failed or was not streamed.
    """
    errors = found.items("errors")
    refuse_failed(found, sum(bool(error) for error in errors), len(errors))
    lengths = {name: len(found.items(name)) for name in LISTS}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise found.refuse(f"its lists are of several lengths ({counts}): it is not whole")
    ttfts, tokens, gaps = found.numbers("ttfts"), found.counts("output_lens"), found.lists("itls")
    if any(count > 1 for count in tokens) and not any(gaps):
        raise found.refuse("no request was streamed: there is no first token to time")
    return [
        Request(
            ttft_ms=1e3 * ttft,
            latency_ms=1e3 * (ttft + sum(some)),
            tpot_ms=1e3 * sum(some) / (count - 1) if count > 1 else None,
            output_tokens=count,
            gaps_ms=[1e3 * gap for gap in some],
        )
        for ttft, some, count in zip(ttfts, gaps, tokens, strict=True)
    ]
