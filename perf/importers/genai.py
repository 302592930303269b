"""genai-perf's profile_export_genai_perf.json, and perf_analyzer's profile_export.json beside it.

The latter has each chunk with its time, but no count of tokens: of it only the gaps are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise

from perf.importers import Identity, Measured
from perf.importers.exports import SUMMARIES, TPOT, average, check_same_run, seconds, statistics
from perf.importers.fields import Fields, read_objects
from perf.importers.loads import COARSE, FROM_SENT, arrivals, described, rate_of, refuse_failed
from perf.importers.samples import summed_up

NOTES = (
    FROM_SENT,
    TPOT,
    "output tokens are what the client's tokenizer makes of the text",
    "TPOT P95 is left out: the records do not have the tokens of a request",
    "the file does not say genai-perf's version: use one for base and head",
)
GAPS = "ITL is of gaps between chunks with text"
NO_RECORDS = "ITL P99 is left out, and whether requests failed is not known: keep {} beside the file"
PROMPTS = ("file", "synthetic_tokens", "output_tokens", "prefix_prompt", "sessions", "extra", "prompt_source")
NS = 1e-6  # in ms


def owns(found: Fields) -> bool:
    config = found.data.get("input_config")
    summary = isinstance(config, dict) and "perf_analyzer" in config
    return summary or {"experiments", "service_kind"} <= found.data.keys()


def read(found: Fields) -> list[Measured]:
    if "experiments" in found:
        raise found.refuse("has perf_analyzer's records alone: name profile_export_genai_perf.json beside it")
    completed = average(found, "request_count")
    stated = statistics(found)
    tokens = round(completed * found.inner("output_sequence_length").number("avg"))
    took = seconds(found, tokens)
    sample, shown = summed_up(stated, SUMMARIES, took)
    shown |= {"output_tokens": tokens}
    shown |= {"prompt_tokens": round(completed * found.inner("input_sequence_length").number("avg"))}
    beside = found.path.with_name(f"{found.path.stem.removesuffix('_genai_perf')}.json")
    if by_request := beside != found.path and beside.is_file():
        times = _times(found, read_objects(beside)[0])
        if len(times) != completed or not times:
            raise found.refuse(
                f"{beside.name} beside it has {len(times)} requests, not {completed}: it is not whole"
            )
        refuse_failed(found, sum(len(chunks) < 2 for chunks in times), len(times))
        check_same_run(found, NS * sum(chunks[1] - chunks[0] for chunks in times) / len(times), beside.name)
        gaps = [NS * (after - before) for _, *chunks in times for before, after in pairwise(chunks)]
        coarse = len(gaps) + len(times) < tokens
        sample |= {} if coarse or not gaps else {"itl_p99_ms": gaps}
        notes = (*NOTES, COARSE.format("some", completed) if coarse else GAPS)
    else:
        notes = (*NOTES, NO_RECORDS.format(beside.name))
    return [Measured(None, _identity(found, completed), took, sample, shown, by_request, notes)]


def _times(found: Fields, records: Fields) -> list[list[int]]:
    """Of each request when it was sent, and when each chunk with text came, in ns."""
    experiments = records.objects("experiments")
    if len(experiments) != 1:
        raise found.refuse(f"has records of {len(experiments)} experiments beside it: measure one load a run")
    return [
        [request.count("timestamp"), *(at for at, event in _events(request) if _has_text(request, event))]
        for request in experiments[0].objects("requests")
    ]


def _events(request: Fields) -> Iterator[tuple[int, str]]:
    """The events of a request's stream, each with its time. What came in one piece has one time; the rest of
    an event that was split has that of its beginning."""
    times, texts = request.counts("response_timestamps"), request.objects("response_outputs")
    if len(times) != len(texts):
        raise request.refuse(f"has {len(times)} times of {len(texts)} responses: it is not whole")
    pieces: list[tuple[int, str]] = []
    for at, one in zip(times, texts, strict=True):
        text = str(one.data.get("response", ""))
        if pieces and not text.startswith(("data:", ":", "event:")):
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + text)
        else:
            pieces.append((at, text))
    for at, text in pieces:
        for event in text.split("\n\n"):
            if event.startswith("data:"):
                yield at, event.removeprefix("data:").strip()


def _has_text(request: Fields, event: str) -> bool:
    """Return whether an event of a stream has text. Raises GateError if it is an error, or no event."""
    if event == "[DONE]":
        return False
    try:
        data = json.loads(event)
        choices = data.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
        raise request.refuse("has a chunk that is no event of an OpenAI stream") from None
    if "error" in data:
        refuse_failed(request, 1, 1)
    texts = (choices[0].get("text"), delta.get("content"), delta.get("reasoning_content"))
    return any(texts)


def _identity(found: Fields, completed: int) -> Identity:
    config = found.inner("input_config")
    options, tool = config.inner("input"), config.inner("perf_analyzer")
    stimulus, measurement = tool.inner("stimulus"), tool.inner("measurement")
    counted = measurement.text("mode") == "request_count"
    endpoint = config.inner("endpoint").text("type")
    known = {name: options.data.get(name) for name in PROMPTS}
    parts = [endpoint, described(known), "" if counted else described(measurement.data)]
    if stimulus.data.keys() == {"concurrency"}:
        arrives, rate = arrivals(math.inf, at_most=stimulus.count("concurrency")), None
    elif stimulus.data.keys() == {"request_rate"}:
        rate = rate_of(stimulus, stimulus.data["request_rate"])
        arrives = arrivals(rate, math.inf)
    else:
        raise stimulus.refuse(f"has {', '.join(stimulus.data)}, of which nothing is known here")
    return Identity(
        model=", ".join(map(str, config.items("model_names"))),
        workload="; ".join(filter(None, parts)),
        arrivals=arrives,
        requests=completed if counted else None,
        offered_rate=rate,
        seed=options.count("random_seed") if "random_seed" in options else None,
    )
