"""What is not imported for what is in it: each in one line that names the file, and nothing is saved."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from perf.errors import GateError
from perf.importers import Tool
from perf.importers.record import rounds_of, run_of
from tests.perf.imported import BESIDE, Edit, first


@pytest.mark.parametrize(
    ("tool", "edit", "message"),
    [
        (
            Tool.GUIDELLM,
            lambda data: data["metadata"].update(version=3),
            "is a report of version 3, and version 2 is what is known here",
        ),
        (
            Tool.AIPERF,
            lambda data: data.update(schema_version="2.0"),
            "is an export of schema 2.0, and 1.4 is what is known here",
        ),
        (
            Tool.AIPERF,
            lambda data: data["request_latency"].update(unit="sec"),
            "profile_export_aiperf.json, request_latency: is in sec, where ms is what is known here",
        ),
        (
            Tool.AIPERF,
            lambda data: data["input_config"]["phases"][0].update(type="user_centric"),
            "input_config, phases[0]: is of type 'user_centric', of which nothing is known here",
        ),
        (
            Tool.GUIDELLM,
            lambda data: data["benchmarks"][0]["config"]["strategy"].update(type_="trace"),
            "config, strategy: is of type 'trace', of which nothing is known here",
        ),
        (
            Tool.GENAI,
            lambda data: data["input_config"]["perf_analyzer"].update(stimulus={"session_concurrency": 2}),
            "stimulus: has session_concurrency, of which nothing is known here",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data.update(ramp_up_strategy="linear"),
            "its rate was ramped up, so that no figure is of one load: measure at a fixed rate",
        ),
        (
            Tool.SGLANG,
            lambda data: data.update(request_rate="trace"),
            "request rate 'trace' is not known here: import runs of a fixed rate",
        ),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_by_name(tool, edit, message, refused, tmp_path):
    code, found = refused(tool, first(tool, tmp_path, edit))
    assert code == 3
    assert message in found


MISSING = {
    Tool.GUIDELLM: ("duration", lambda data: data["benchmarks"][0]),
    Tool.AIPERF: ("total_osl", lambda data: data),
    Tool.VLLM_BENCH: ("failed", lambda data: data),
    Tool.SGLANG: ("duration", lambda data: data),
    Tool.GENAI: ("output_sequence_length", lambda data: data),
}


@pytest.mark.parametrize("tool", list(Tool))
def test_a_missing_key_is_named(tool, refused, tmp_path):
    key, inside = MISSING[tool]
    code, message = refused(tool, first(tool, tmp_path, lambda data: inside(data).pop(key)))
    assert code == 3
    assert message.endswith(f": has no {key!r}, which results of this tool have")


@pytest.mark.parametrize("value", ["8", -1, None, True, 1.5, float("nan")])
def test_a_value_that_is_not_of_its_kind_is_named(value, refused, tmp_path):
    path = first(Tool.VLLM_BENCH, tmp_path, lambda data: data.update(completed=value))
    wanted = f"{path}: 'completed' is not a whole number of 0 or more"
    assert refused(Tool.VLLM_BENCH, path) == (3, wanted)


FAILED: dict[Tool, tuple[Edit | None, Edit | None, str]] = {
    Tool.GUIDELLM: (
        lambda data: data["benchmarks"][0]["metrics"]["request_totals"].update(errored=3, total=11),
        None,
        "3 of 11 requests failed",
    ),
    Tool.AIPERF: (
        lambda data: data.update(error_request_count={"unit": "requests", "avg": 3.0}),
        None,
        "3 of 11 requests failed",
    ),
    Tool.VLLM_BENCH: (lambda data: data.update(failed=3), None, "3 of 11 requests failed"),
    Tool.SGLANG: (lambda data: data["errors"].__setitem__(2, "500"), None, "1 of 8 requests failed"),
    Tool.GENAI: (
        None,
        lambda data: data["experiments"][0]["requests"][3].update(
            response_timestamps=[], response_outputs=[]
        ),
        "1 of 8 requests failed",
    ),
}


@pytest.mark.parametrize("tool", list(Tool))
def test_a_file_with_failed_requests_says_how_many(tool, refused, tmp_path):
    edit, beside, message = FAILED[tool]
    code, found = refused(tool, first(tool, tmp_path, edit, beside))
    assert code == 3
    assert found.endswith(f": {message}: mend that, and run the tool again")


def test_a_record_that_failed_counts_too_where_the_summary_does_not_say(refused, tmp_path):
    def fail(record: Any) -> None:
        record["error"] = {"code": 500}

    assert "8 of 8 requests failed" in refused(Tool.AIPERF, first(Tool.AIPERF, tmp_path, beside=fail))[1]

    def event(data: Any) -> None:
        data["experiments"][0]["requests"][0]["response_outputs"][1]["response"] = 'data: {"error": {}}\n\n'

    code, message = refused(Tool.GENAI, first(Tool.GENAI, tmp_path, beside=event))
    assert (code, "1 of 1 requests failed" in message) == (3, True)


@pytest.mark.parametrize(
    ("tool", "edit", "beside", "message"),
    [
        (
            Tool.AIPERF,
            lambda data: data.update(was_cancelled=True),
            None,
            "is of a run that was cancelled or cut short: run it again",
        ),
        (
            Tool.AIPERF,
            None,
            lambda data: data["metrics"]["time_to_first_token"].update(value=1.0),
            "keep the files of a run together",
        ),
        (
            Tool.AIPERF,
            None,
            lambda data: data["metrics"]["output_sequence_length"].update(value=17),
            "its records are of 8 requests with 136 output tokens, its summary of 8 with 128",
        ),
        (
            Tool.GENAI,
            None,
            lambda data: data["experiments"][0]["requests"][0].update(timestamp=0),
            "keep the files of a run together",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data["ttfts"].pop(),
            None,
            "its lists are of several lengths (ttfts 7, itls 8, output_lens 8, errors 8): it is not whole",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data.update(completed=7),
            None,
            "its records are of 8 requests with 128 output tokens, its summary of 7 with 128",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data.update(ttfts=[0.0] * 8),
            None,
            "TTFT P50 is 0.0, which is not a finite number above 0",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data.update(duration=0),
            None,
            "took 0 s: the tool's clock stood still",
        ),
        (
            Tool.VLLM_BENCH,
            lambda data: data.update(completed=0),
            None,
            "has 0 requests with 128 output tokens: nothing was measured",
        ),
        (
            Tool.SGLANG,
            lambda data: data.update(itls=[[]] * 8),
            None,
            "no request was streamed: there is no first token to time",
        ),
        (
            Tool.GUIDELLM,
            lambda data: data["benchmarks"][0]["requests"]["successful"].pop(),
            None,
            "keeps 7 of 8 requests: run it again without sample_size in --metrics",
        ),
        (
            Tool.GUIDELLM,
            lambda data: data.update(benchmarks=[]),
            None,
            "has no benchmark in it: nothing was measured",
        ),
    ],
)
def test_what_is_not_whole_or_measured_nothing_is_refused(tool, edit, beside, message, refused, tmp_path):
    code, found = refused(tool, first(tool, tmp_path, edit, beside))
    assert code == 3
    assert message in found


WRONG = [None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), 1e308, "", "x", [], {}, [None], [[]]]


@pytest.mark.parametrize("tool", list(Tool))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_whatever_stands_in_the_place_of_a_value_is_imported_or_refused_in_one_line(
    tool, tmp_path, monkeypatch
):
    monkeypatch.setattr("pytest_benchmark.utils.get_commit_info", dict)
    rng = random.Random(7)

    def spoil(data: Any) -> None:
        key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
        inner = data[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            spoil(inner)
        else:
            data[key] = rng.choice(WRONG)

    messages = []
    for at in range(60):
        beside = tool in BESIDE and at % 2
        path = first(tool, tmp_path, None if beside else spoil, spoil if beside else None)
        try:
            json.dumps(run_of(tool, rounds_of(tool, [path])), allow_nan=False)
        except GateError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)
