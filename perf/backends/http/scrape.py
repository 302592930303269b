"""What a server counts itself, from its Prometheus page, before and after a round.

The names are those of vLLM, SGLang and llama.cpp; a server without the page, or without a name, tells less.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from perf.backends.http.connection import Connection

# Ours, and the sample that counts it: the change over a round is what is recorded.
COUNTERS = {
    "vllm:num_preemptions_total": "server_preemptions",
    "sglang:num_retracted_reqs_total": "server_preemptions",
    "vllm:prefix_cache_hits_total": "server_prefix_hits",
    "vllm:prefix_cache_queries_total": "server_prefix_queries",
    "vllm:request_queue_time_seconds_sum": "_queue_s",
    "vllm:request_queue_time_seconds_count": "_queued",
    "sglang:queue_time_seconds_sum": "_queue_s",
    "sglang:queue_time_seconds_count": "_queued",
    "llamacpp:prompt_tokens_cached_total": "server_prefix_hits",
    "llamacpp:n_decode_total": "server_decode_calls",
}


async def read(connection: Connection) -> dict[str, float] | None:
    """Return the counters that are known, by our names; None without a page of metrics."""
    answer = await connection.get("/metrics")
    if answer.status != 200:
        return None
    try:
        families = list(text_string_to_metric_families(answer.text))
    except ValueError:
        return None  # a page of another kind
    found: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if name := COUNTERS.get(sample.name):
                found[name] = found.get(name, 0.0) + sample.value
    return found


def changes(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float]:
    """Return by how much each counter grew, and the mean time in the queue; empty if nothing is known."""
    grown = {name: value - (before or {}).get(name, 0.0) for name, value in (after or {}).items()}
    seconds, requests = grown.pop("_queue_s", None), grown.pop("_queued", None)
    if seconds is not None and requests:
        grown["server_queue_mean_ms"] = 1e3 * seconds / requests
    return grown
