"""guidellm's `--output kind=json`: a report of one benchmark a rate, with the record of each request."""

from __future__ import annotations

import math

from perf.importers import NOT_STATED, Identity, Measured
from perf.importers.fields import Fields
from perf.importers.loads import FROM_SENT, arrivals, described, rate_of, refuse_failed
from perf.importers.samples import Request, sampled

SCHEMA = 2  # of the report; guidellm 0.8 writes it
NOTES = (
    FROM_SENT,
    "latency ends with the end of the response, TPOT (guidellm's ITL) with the last token",
    "percentiles are numpy's, of the records; guidellm's own are the nearest value below",
    "output tokens are the server's usage, or where it gives none the client's count",
    "ITL is left out: the records have the first and the last token of a request, not those between",
)
CUT = "requests that the end of the run cut off are left out"


def owns(found: Fields) -> bool:
    metadata = found.data.get("metadata")
    return isinstance(metadata, dict) and "guidellm_version" in metadata


def read(found: Fields) -> list[Measured]:
    metadata = found.inner("metadata")
    if (schema := metadata.count("version")) != SCHEMA:
        raise found.refuse(f"is a report of version {schema}, and version {SCHEMA} is what is known here")
    version = metadata.text("guidellm_version")
    benchmarks = found.objects("benchmarks")
    if not benchmarks:
        raise found.refuse("has no benchmark in it: nothing was measured")
    spec = found.inner("config").inner("spec")
    return [_measured(spec, one, version) for one in benchmarks]


def _measured(spec: Fields, found: Fields, version: str) -> Measured:
    totals = found.inner("metrics").inner("request_totals")
    completed, cut = totals.count("successful"), totals.count("incomplete")
    refuse_failed(found, totals.count("errored"), totals.count("total"))
    records = found.inner("requests").objects("successful")
    if len(records) < completed:
        kept = f"keeps {len(records)} of {completed} requests"
        raise found.refuse(f"{kept}: run it again without sample_size in --metrics")
    requests = [_request(record) for record in records]
    tokens = sum(request.output_tokens for request in requests)
    seconds = found.number("duration")
    sample, shown, _ = sampled(found, requests, seconds, (completed, tokens))
    shown["prompt_tokens"] = sum(record.count("prompt_tokens") for record in records)
    warnings = [f"guidellm warns: {one.text('code')}" for one in found.objects("warnings")]
    notes = (*NOTES, *([CUT] if cut else []), *warnings)
    return Measured(version, _identity(spec, found, completed), seconds, sample, shown, notes=notes)


def _request(found: Fields) -> Request:
    tokens = found.count("output_tokens")
    return Request(
        ttft_ms=found.number("time_to_first_token_ms"),
        latency_ms=1e3 * found.number("request_latency"),
        tpot_ms=found.number("inter_token_latency_ms") if tokens > 1 else None,
        output_tokens=tokens,
    )


def _identity(spec: Fields, found: Fields, completed: int) -> Identity:
    """What was run: prompts, limits and all that the report says of how requests were sent and left out."""
    config = found.inner("config")
    backend, limits = config.inner("backend"), config.inner("constraints")
    arrives, rate = _arrivals(config)
    parts = [backend.text("request_format"), *map(described, spec.items("data"))]
    parts += [_limit(limits.inner(name)) for name in limits.data]
    if config.inner("strategy").data.get("rampup_duration"):
        parts.append(f"ramp-up {config.inner('strategy').number('rampup_duration'):g} s")
    for name in ("warmup", "cooldown"):
        if any(config.inner(name).data.get(key) for key in ("percent", "value")):
            parts.append(f"{name} {described(config.data[name])}")
    return Identity(
        model=backend.text("model") if "model" in backend else NOT_STATED,
        workload="; ".join(parts),
        arrivals=arrives,
        requests=None if "max_duration" in limits else completed,
        offered_rate=rate,
        seed=spec.inner("seed").count("value"),
    )


def _limit(limit: Fields) -> str:
    """A limit of a benchmark, in words; what differs from one benchmark of a report to the next is a list."""
    at, args = limit.count("current_index"), limit.inner("args").data
    mine = {
        name: value[at % len(value)] if isinstance(value, list) and value else value
        for name, value in args.items()
    }
    return described(mine, without=("stopping_scope",))


def _arrivals(config: Fields) -> tuple[str, float | None]:
    """When requests come, in words, and how many a second if that was set."""
    strategy, profile = config.inner("strategy"), config.inner("profile")
    kind = strategy.text("type_")
    at_most = profile.count("max_concurrency") if "max_concurrency" in profile else None
    if kind == "synchronous":
        return arrivals(math.inf, at_most=1), None
    if kind == "concurrent":
        return arrivals(math.inf, at_most=strategy.count("streams")), None
    if kind == "throughput":
        return arrivals(math.inf, at_most=at_most), None
    if kind in ("constant", "poisson"):
        rate = rate_of(strategy, strategy.data.get("rate"))
        return arrivals(rate, math.inf if kind == "constant" else 1, at_most), rate
    raise strategy.refuse(f"is of type {kind!r}, of which nothing is known here")
