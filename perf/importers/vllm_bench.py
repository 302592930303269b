"""`vllm bench serve --save-result`, with or without `--save-detailed`: one JSON object, or one a line.

The file says neither vllm's version nor what the prompts were.
"""

from __future__ import annotations

import math

from perf.importers import Identity, Measured
from perf.importers.fields import Fields
from perf.importers.lists import requests_of, summaries
from perf.importers.loads import FROM_SENT, NEED_VALUES, arrivals, rate_of, refuse_empty, refuse_failed
from perf.importers.samples import sampled, summed_up

MARKS = ("endpoint_type", "model_id", "tokenizer_id", "burstiness")
NOTES = (
    FROM_SENT,
    "TTFT ends with the first chunk that has choices, be there text in it or not",
    "output tokens are the server's usage, or where there is none what the client's tokenizer counts",
    "the file does not say vllm's version: use one for base and head",
)
NO_RECORDS = NEED_VALUES.format("save with --save-detailed")
SUMMARIES = summaries("e2el")


def owns(found: Fields) -> bool:
    return all(key in found.data for key in MARKS)


def read(found: Fields) -> list[Measured]:
    completed, tokens = found.count("completed"), found.count("total_output_tokens")
    refuse_failed(found, failed := found.count("failed"), completed + failed)
    refuse_empty(found, completed, tokens)
    seconds = found.number("duration")
    if by_request := "ttfts" in found:
        sample, shown, coarse = sampled(found, requests_of(found), seconds, (completed, tokens))
        notes = (*NOTES, *coarse)
    else:
        sample, shown = summed_up(found, SUMMARIES, seconds)
        notes = (*NOTES, NO_RECORDS)
    shown["prompt_tokens"] = found.count("total_input_tokens")
    return [Measured(None, _identity(found, completed), seconds, sample, shown, by_request, notes)]


def _identity(found: Fields, completed: int) -> Identity:
    """What was run. `--metadata workload=...` says what the prompts were; without it their tokens have to
    do."""
    if "ramp_up_strategy" in found:
        raise found.refuse(
            "its rate was ramped up, so that no figure is of one load: measure at a fixed rate"
        )
    stated = found.data.get("request_rate")
    rate = rate_of(found, math.inf if stated == "inf" else stated)
    burstiness = rate_of(found, found.data.get("burstiness"))
    at_most = found.count("max_concurrency") if "max_concurrency" in found else None
    prompts = f"{found.count('total_input_tokens')} prompt tokens"
    return Identity(
        model=found.text("model_id"),
        workload=f"{found.text('backend')}, {found.text('workload') if 'workload' in found else prompts}",
        arrivals=arrivals(rate, burstiness, at_most),
        requests=completed,
        offered_rate=None if math.isinf(rate) else rate,
    )
