"""Records that `vllm bench` and sglang's bench_serving share, one having begun as a copy of the other: TTFTs,
gaps, output tokens and errors of the requests, in lists side by side."""

from __future__ import annotations

from perf.importers.fields import Fields
from perf.importers.loads import refuse_failed
from perf.importers.samples import Request

LISTS = ("ttfts", "itls", "output_lens", "errors")


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
