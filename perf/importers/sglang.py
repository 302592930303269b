"""sglang's bench_serving, `--output-file FILE`, with or without `--output-details`: one JSON object a line.

It appends, so that a file may hold many runs. None of them says the tool's version.
"""

from __future__ import annotations

import math

from perf.importers import NOT_STATED, Identity, Measured
from perf.importers.fields import Fields
from perf.importers.lists import requests_of, summaries
from perf.importers.loads import FROM_SENT, NEED_VALUES, arrivals, rate_of, refuse_empty
from perf.importers.samples import sampled, summed_up

MARKS = ("dataset_name", "random_range_ratio", "accept_length", "median_e2e_latency_ms")
NOTES = (
    FROM_SENT,
    "output tokens are the server's usage, or where it gives none as many as were asked for",
    "with the backend sglang a gap over several tokens counts as so many equal ones",
    "wall time includes a request for the server's state after the last reply",
    "the file does not say sglang's version: use one for base and head",
)
TO_LAST_TOKEN = (
    "latency and TPOT end with the last token; the tool's own, which end with [DONE], are a little longer"
)
TO_DONE = "latency and TPOT end with [DONE], not with the last token"
UNKNOWN_FAILED = "whether requests failed is not known without --output-details"
SUMMARIES = summaries("e2e_latency")


def owns(found: Fields) -> bool:
    return all(key in found.data for key in MARKS)


def read(found: Fields) -> list[Measured]:
    completed, tokens = found.count("completed"), found.count("total_output_tokens")
    seconds = found.number("duration")
    if by_request := "ttfts" in found:
        sample, shown, coarse = sampled(found, requests_of(found), seconds, (completed, tokens))
        notes = (*NOTES, TO_LAST_TOKEN, *coarse)
    else:
        refuse_empty(found, completed, tokens)
        sample, shown = summed_up(found, SUMMARIES, seconds)
        notes = (*NOTES, TO_DONE, UNKNOWN_FAILED, NEED_VALUES.format("save with --output-details"))
    shown["prompt_tokens"] = found.count("total_input_tokens")
    return [Measured(None, _identity(found, completed), seconds, sample, shown, by_request, notes)]


def _identity(found: Fields, completed: int) -> Identity:
    """What was run. Only a server of sglang says its model; the prompts are known by their data set."""
    server = found.inner("server_info") if "server_info" in found else None
    dataset = found.text("dataset_name")
    if dataset.startswith("random"):
        lengths = f"in {found.count('random_input_len')}, out {found.count('random_output_len')}"
        dataset += f", {lengths}, range ratio {found.number('random_range_ratio'):g}"
    elif "sharegpt_output_len" in found:
        dataset += f", out {found.count('sharegpt_output_len')}"
    rate = rate_of(found, found.data.get("request_rate"))
    at_most = found.count("max_concurrency") if "max_concurrency" in found else None
    return Identity(
        model=server.text("model_path") if server and "model_path" in server else NOT_STATED,
        workload=f"{found.text('backend')}, {dataset}",
        arrivals=arrivals(rate, at_most=at_most),
        requests=completed,
        offered_rate=None if math.isinf(rate) else rate,
    )
