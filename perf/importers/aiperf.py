"""aiperf's profile_export_aiperf.json, and the records in profile_export.jsonl beside it."""

from __future__ import annotations

import math

from perf.importers import Identity, Measured
from perf.importers.exports import SUMMARIES, TPOT, average, check_same_run, seconds, statistics
from perf.importers.fields import Fields, read_objects
from perf.importers.loads import FROM_SENT, NEED_VALUES, arrivals, described, rate_of, refuse_failed
from perf.importers.samples import Request, sampled, summed_up

SCHEMA = "1.4"  # aiperf 0.13 writes it
NOTES = (
    FROM_SENT,
    TPOT,
    "output tokens are what the client's tokenizer makes of the text, unless --use-server-token-count",
    "wall time is that of the tool's throughput, from the start of the phase to its end",
)
NO_RECORDS = NEED_VALUES.format("keep profile_export.jsonl beside the file")
PROFILING = "profiling"
OF_LOAD = ("name", "kind", "type", "rate", "smoothness", "requests", "concurrency")  # said by other words


def owns(found: Fields) -> bool:
    return "aiperf_version" in found or {"metadata", "metrics"} == found.data.keys() - {"error", "trace_data"}


def read(found: Fields) -> list[Measured]:
    if "aiperf_version" not in found:
        raise found.refuse("has aiperf's records alone: name profile_export_aiperf.json, with this beside it")
    if (schema := found.text("schema_version")) != SCHEMA:
        raise found.refuse(f"is an export of schema {schema}, and {SCHEMA} is what is known here")
    if found.data.get("was_cancelled") or found.data.get("is_complete") is False:
        raise found.refuse("is of a run that was cancelled or cut short: run it again")
    completed, tokens = average(found, "request_count"), average(found, "total_osl")
    failed = average(found, "error_request_count") if "error_request_count" in found else 0
    refuse_failed(found, failed, completed + failed)
    stated = statistics(found)
    took = seconds(found, tokens)
    beside = found.path.with_name(f"{found.path.stem.removesuffix('_aiperf')}.jsonl")
    if by_request := beside.is_file():
        requests = _requests(found, read_objects(beside))
        sample, shown, coarse = sampled(found, requests, took, (completed, tokens))
        check_same_run(found, float(shown["ttft_mean_ms"] or 0), beside.name)
        notes = (*NOTES, *coarse)
    else:
        sample, shown = summed_up(stated, SUMMARIES, took)
        shown["output_tokens"] = tokens
        notes = (*NOTES, NO_RECORDS)
    shown["prompt_tokens"] = average(found, "total_isl")
    version = found.text("aiperf_version")
    return [Measured(version, _identity(found, completed), took, sample, shown, by_request, notes)]


def _requests(found: Fields, records: list[Fields]) -> list[Request]:
    """The requests of the measured phase."""
    kept = [one for one in records if one.inner("metadata").text("benchmark_phase") == PROFILING]
    refuse_failed(found, sum("error" in one for one in kept), len(kept))
    requests = []
    for metrics in (one.inner("metrics") for one in kept):
        tokens = metrics.inner("output_sequence_length").count("value")
        ttft_ms, latency_ms = (
            metrics.inner(name).number("value") for name in ("time_to_first_token", "request_latency")
        )
        tpot_ms = metrics.inner("inter_token_latency").number("value") if tokens > 1 else None
        gaps = "inter_chunk_latency"  # absent where all came in one chunk
        gaps_ms = metrics.inner(gaps).numbers("value") if gaps in metrics else []
        requests.append(Request(ttft_ms, latency_ms, tpot_ms, tokens, gaps_ms))
    return requests


def _identity(found: Fields, completed: int) -> Identity:
    config = found.inner("input_config")
    phases = [phase for phase in config.objects("phases") if phase.text("kind") == PROFILING]
    if len(phases) != 1:
        raise found.refuse(f"has {len(phases)} phases of profiling: measure one load a run")
    (phase,) = phases
    endpoint = config.inner("endpoint")
    datasets = (described(one.data, without=("name",)) for one in config.objects("datasets"))
    parts = [endpoint.text("type"), *datasets]
    parts += [described(endpoint.data["extra"])] if "extra" in endpoint else []
    parts += [rest] if (rest := described(phase.data, without=OF_LOAD)) else []
    arrives, rate = _arrivals(phase)
    run = found.inner("run_info")
    return Identity(
        model=", ".join(one.text("name") for one in config.inner("models").objects("items")),
        workload="; ".join(parts),
        arrivals=arrives,
        requests=None if "duration" in phase else completed,
        offered_rate=rate,
        seed=run.count("random_seed") if "random_seed" in run else None,
    )


def _arrivals(phase: Fields) -> tuple[str, float | None]:
    """When requests come, in words, and how many a second if that was set."""
    kind = phase.text("type")
    at_most = phase.count("concurrency") if "concurrency" in phase else None
    if kind == "concurrency":
        return arrivals(math.inf, at_most=at_most), None
    shapes = {"poisson": 1.0, "constant": math.inf, "gamma": phase.data.get("smoothness")}
    if kind not in shapes:
        raise phase.refuse(f"is of type {kind!r}, of which nothing is known here")
    rate = rate_of(phase, phase.data.get("rate"))
    return arrivals(rate, rate_of(phase, shapes[kind]), at_most), rate
