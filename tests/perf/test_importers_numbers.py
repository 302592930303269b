"""What is read of a tool's file is what the tool itself says: its counts, means and percentiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perf.gate.metrics import GATED, METRICS, POOLED
from perf.importers import Measured, Tool
from perf.importers.readers import read
from tests.perf.imported import DATA, RUNS, content, copied

REQUESTS, TOKENS = 8, 128  # of each run but those that a time limit ended


def only(tool: Tool, name: str, folder: Path) -> Measured:
    ((_, measured),) = read(tool, copied(tool, name, folder))
    return measured


def at(values: list[float], percentile: float, method: str = "linear") -> float:
    return float(np.percentile(values, percentile, method=method))  # type: ignore[call-overload]


@pytest.mark.parametrize("tool", list(Tool))
@pytest.mark.parametrize("run", [0, 1])
def test_every_tool_gives_what_was_run_and_the_gated_times(tool, run, tmp_path):
    found = only(tool, RUNS[tool][run], tmp_path)
    assert found.identity.arrivals == "concurrency:4"
    assert (found.identity.requests, found.shown["output_tokens"]) == (REQUESTS, TOKENS)
    assert found.identity.model == "smollm2"
    wanted = {"tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "latency_p95_ms"}
    wanted |= {"itl_p99_ms"} if tool is not Tool.GUIDELLM else set()
    wanted |= {"tpot_p95_ms"} if tool is not Tool.GENAI else set()
    assert set(found.sample) == wanted
    assert found.sample.keys() <= set(GATED)
    assert all(isinstance(found.sample[name], list) for name in wanted & set(POOLED))
    assert found.seconds == pytest.approx(TOKENS / found.sample["tokens_per_s"])
    assert {name for name in found.shown if name.endswith("_ms")} <= METRICS.keys() | {
        f"{name}_mean_ms" for name in ("ttft", "tpot", "latency")
    }
    assert found.by_request
    assert found.notes


def test_guidellm(tmp_path):
    """Its percentiles are the nearest value below, so that only ours of its records can be linear."""
    name = RUNS[Tool.GUIDELLM][0]
    found, data = only(Tool.GUIDELLM, name, tmp_path), content(Tool.GUIDELLM, name)
    (one,) = data["benchmarks"]
    said = {
        key: value["successful"] for key, value in one["metrics"].items() if "successful" in (value or {})
    }
    assert one["metrics"]["request_totals"]["successful"] == found.identity.requests
    assert said["output_token_count"]["total_sum"] == found.shown["output_tokens"]
    assert said["prompt_token_count"]["total_sum"] == pytest.approx(found.shown["prompt_tokens"])
    assert said["output_tokens_per_second"]["mean"] == pytest.approx(found.sample["tokens_per_s"])
    assert said["time_to_first_token_ms"]["mean"] == pytest.approx(found.shown["ttft_mean_ms"])
    assert 1e3 * said["request_latency"]["mean"] == pytest.approx(found.shown["latency_mean_ms"])
    tpots = found.sample["tpot_p95_ms"]
    assert said["inter_token_latency_ms"]["mean"] == pytest.approx(np.mean(tpots))
    assert said["inter_token_latency_ms"]["median"] == pytest.approx(at(tpots, 50, "inverted_cdf"))
    assert said["inter_token_latency_ms"]["percentiles"]["p95"] == at(tpots, 95, "inverted_cdf")
    ttfts = [record["time_to_first_token_ms"] for record in one["requests"]["successful"]]
    assert said["time_to_first_token_ms"]["percentiles"]["p95"] == at(ttfts, 95, "inverted_cdf")
    assert found.sample["ttft_p95_ms"] == at(ttfts, 95)
    assert found.version == data["metadata"]["guidellm_version"] == "0.8.1"
    assert found.identity.seed == 42
    assert found.identity.workload == (
        "/v1/chat/completions; kind synthetic_text, prompt_tokens 32, output_tokens 16, turns 1; "
        "kind max_requests, count 8"
    )


def test_guidellm_has_a_benchmark_a_rate_and_a_time_limit_leaves_the_number_of_requests_open(tmp_path):
    found = [measured for _, measured in read(Tool.GUIDELLM, copied(Tool.GUIDELLM, "rates.json", tmp_path))]
    assert [one.identity.arrivals for one in found] == ["poisson:4", "poisson:8"]
    assert [one.identity.offered_rate for one in found] == [4.0, 8.0]
    assert {one.identity.requests for one in found} == {None}
    assert all("kind max_duration, seconds 1" in one.identity.workload for one in found)
    totals = [one["metrics"]["request_totals"] for one in content(Tool.GUIDELLM, "rates.json")["benchmarks"]]
    assert [one.shown["output_tokens"] for one in found] == [16 * one["successful"] for one in totals]
    for one, total in zip(found, totals, strict=True):
        cut = "requests that the end of the run cut off are left out"
        assert (cut in one.notes) == bool(total["incomplete"])
    assert {one.identity.model for one in found} == {"smollm2"}  # which the server was asked for
    warned = [
        [one["code"] for one in each["warnings"]]
        for each in content(Tool.GUIDELLM, "rates.json")["benchmarks"]
    ]
    assert [[note for note in one.notes if "warns" in note] for one in found] == [
        [f"guidellm warns: {code}" for code in codes] for codes in warned
    ]


def test_aiperf(tmp_path):
    name = RUNS[Tool.AIPERF][0]
    found, data = only(Tool.AIPERF, name, tmp_path), content(Tool.AIPERF, name)
    assert data["request_count"]["avg"] == found.identity.requests
    assert data["total_osl"]["avg"] == found.shown["output_tokens"]
    assert data["total_isl"]["avg"] == found.shown["prompt_tokens"]
    assert data["output_token_throughput"]["avg"] == pytest.approx(found.sample["tokens_per_s"])
    for statistic, ours in (("avg", "mean"), ("p99", "p99")):
        assert data["time_to_first_token"][statistic] == pytest.approx(found.shown[f"ttft_{ours}_ms"])
        assert data["request_latency"][statistic] == pytest.approx(found.shown[f"latency_{ours}_ms"])
        assert data["inter_token_latency"][statistic] == pytest.approx(found.shown[f"tpot_{ours}_ms"])
    assert data["time_to_first_token"]["p50"] == pytest.approx(found.sample["ttft_p50_ms"])
    assert data["time_to_first_token"]["p95"] == pytest.approx(found.sample["ttft_p95_ms"])
    assert data["request_latency"]["p95"] == pytest.approx(found.sample["latency_p95_ms"])
    assert data["inter_token_latency"]["p50"] == pytest.approx(found.sample["tpot_p50_ms"])
    assert data["inter_token_latency"]["p95"] == pytest.approx(at(found.sample["tpot_p95_ms"], 95))
    assert data["inter_chunk_latency"]["p99"] == pytest.approx(at(found.sample["itl_p99_ms"], 99))
    assert (found.version, found.identity.seed) == ("0.13.0", 7)
    assert found.identity.workload == (
        "chat; type synthetic, entries 8, random_seed 7, prompts (isl (mean 32.0), osl (mean 16.0)); "
        "ignore_eos True"
    )


def test_aiperf_without_its_records_gives_what_it_summed_up(tmp_path):
    name = RUNS[Tool.AIPERF][0]
    path = copied(Tool.AIPERF, name, tmp_path)
    ((_, whole),) = read(Tool.AIPERF, path)
    (path.parent / "profile_export.jsonl").unlink()
    ((_, found),) = read(Tool.AIPERF, path)
    assert found.sample == pytest.approx({k: v for k, v in whole.sample.items() if k not in POOLED})
    assert not found.by_request
    assert found.notes[-1].endswith("keep profile_export.jsonl beside the file")


def test_aiperf_leaves_the_requests_of_its_warmup_out(tmp_path):
    found = only(Tool.AIPERF, "rate/profile_export_aiperf.json", tmp_path)
    assert (found.identity.arrivals, found.identity.offered_rate) == ("poisson:20", 20.0)
    assert (found.identity.requests, found.shown["output_tokens"]) == (REQUESTS, TOKENS)
    assert found.by_request


def test_vllm_bench(tmp_path):
    name = RUNS[Tool.VLLM_BENCH][0]
    found, data = only(Tool.VLLM_BENCH, name, tmp_path), content(Tool.VLLM_BENCH, name)
    assert data["completed"] == found.identity.requests
    assert data["total_output_tokens"] == found.shown["output_tokens"]
    assert data["total_input_tokens"] == found.shown["prompt_tokens"]
    assert data["output_throughput"] == pytest.approx(found.sample["tokens_per_s"])
    for metric, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("latency", "e2el")):
        assert data[f"mean_{theirs}_ms"] == pytest.approx(found.shown[f"{metric}_mean_ms"])
        assert data[f"p99_{theirs}_ms"] == pytest.approx(found.shown[f"{metric}_p99_ms"])
    assert data["median_ttft_ms"] == pytest.approx(found.sample["ttft_p50_ms"])
    assert data["p95_ttft_ms"] == pytest.approx(found.sample["ttft_p95_ms"])
    assert data["p95_e2el_ms"] == pytest.approx(found.sample["latency_p95_ms"])
    assert data["median_tpot_ms"] == pytest.approx(found.sample["tpot_p50_ms"])
    assert data["p95_tpot_ms"] == pytest.approx(at(found.sample["tpot_p95_ms"], 95))
    assert data["p99_itl_ms"] == pytest.approx(at(found.sample["itl_p99_ms"], 99))
    assert found.version is None
    assert found.identity.workload == f"openai-chat, {data['total_input_tokens']} prompt tokens"


def test_vllm_bench_without_details_gives_what_it_summed_up(tmp_path):
    found, data = only(Tool.VLLM_BENCH, "summary.json", tmp_path), content(Tool.VLLM_BENCH, "summary.json")
    assert found.sample == {
        "tokens_per_s": data["output_throughput"],
        "ttft_p50_ms": data["median_ttft_ms"],
        "ttft_p95_ms": data["p95_ttft_ms"],
        "tpot_p50_ms": data["median_tpot_ms"],
        "latency_p95_ms": data["p95_e2el_ms"],
    }
    assert not found.by_request
    assert (found.identity.arrivals, found.identity.offered_rate) == ("poisson:20", 20.0)


def test_vllm_bench_says_what_the_prompts_were_where_it_was_told_to(tmp_path):
    path = copied(
        Tool.VLLM_BENCH, "summary.json", tmp_path, lambda data: data.update(workload="chat, 512 in, 64 out")
    )
    ((_, found),) = read(Tool.VLLM_BENCH, path)
    assert found.identity.workload == "openai, chat, 512 in, 64 out"


@pytest.mark.parametrize(
    ("rate", "burstiness", "at_most", "words"),
    [
        ("inf", 1.0, None, "all"),
        ("inf", 1.0, 4, "concurrency:4"),
        (2.5, 1.0, None, "poisson:2.5"),
        (2.5, 1.0, 8, "poisson:2.5, at most 8"),
        (3, float("inf"), None, "constant:3"),
        (3, 0.5, None, "gamma:3, burstiness 0.5"),
    ],
)
def test_when_requests_come_is_said_in_words(rate, burstiness, at_most, words, tmp_path):
    def edit(data):
        data.update(request_rate=rate, burstiness=burstiness, max_concurrency=at_most)

    ((_, found),) = read(Tool.VLLM_BENCH, copied(Tool.VLLM_BENCH, "summary.json", tmp_path, edit))
    assert found.identity.arrivals == words
    assert found.identity.offered_rate == (None if rate == "inf" else rate)


def test_sglang(tmp_path):
    """Its own latency and TPOT end with [DONE], ours with the last token."""
    name = RUNS[Tool.SGLANG][0]
    found, data = only(Tool.SGLANG, name, tmp_path), content(Tool.SGLANG, name)
    assert data["completed"] == found.identity.requests
    assert data["total_output_tokens"] == found.shown["output_tokens"]
    assert data["output_throughput"] == pytest.approx(found.sample["tokens_per_s"])
    assert data["mean_ttft_ms"] == pytest.approx(found.shown["ttft_mean_ms"])
    assert data["median_ttft_ms"] == pytest.approx(found.sample["ttft_p50_ms"])
    assert data["p95_ttft_ms"] == pytest.approx(found.sample["ttft_p95_ms"])
    assert data["p99_itl_ms"] == pytest.approx(at(found.sample["itl_p99_ms"], 99))
    for ours, theirs in (("latency_mean_ms", "mean_e2e_latency_ms"), ("tpot_mean_ms", "mean_tpot_ms")):
        assert found.shown[ours] <= data[theirs] == pytest.approx(found.shown[ours], rel=0.1)
    assert found.identity.workload == "sglang, random-ids, in 32, out 16, range ratio 1"


def test_sglang_appends_and_each_line_is_a_round(tmp_path):
    path = copied(Tool.SGLANG, "summaries.jsonl", tmp_path)
    found = read(Tool.SGLANG, path)
    assert [where for where, _ in found] == [f"{path}, line 1", f"{path}, line 2"]
    data, (_, one) = content(Tool.SGLANG, "summaries.jsonl"), found[0]
    assert one.sample == {
        "tokens_per_s": data["output_throughput"],
        "ttft_p50_ms": data["median_ttft_ms"],
        "ttft_p95_ms": data["p95_ttft_ms"],
        "tpot_p50_ms": data["median_tpot_ms"],
        "latency_p95_ms": data["p95_e2e_latency_ms"],
    }
    assert not one.by_request
    assert one.identity.arrivals == "poisson:20"


def test_sglang_s_model_is_not_known_of_another_server(tmp_path):
    path = copied(Tool.SGLANG, RUNS[Tool.SGLANG][0], tmp_path, lambda data: data.update(server_info=None))
    assert read(Tool.SGLANG, path)[0][1].identity.model == "not stated"


def test_genai(tmp_path):
    """Of its records only the gaps are taken, but they tell that the file beside it is of the same run."""
    name = RUNS[Tool.GENAI][0]
    found, data = only(Tool.GENAI, name, tmp_path), content(Tool.GENAI, name)
    assert data["request_count"]["avg"] == found.identity.requests
    assert data["output_token_throughput"]["avg"] == found.sample["tokens_per_s"]
    assert data["time_to_first_token"]["avg"] == found.shown["ttft_mean_ms"]
    assert data["time_to_first_token"]["p50"] == found.sample["ttft_p50_ms"]
    assert data["time_to_first_token"]["p95"] == found.sample["ttft_p95_ms"]
    assert data["inter_token_latency"]["p50"] == found.sample["tpot_p50_ms"]
    assert data["request_latency"]["p95"] == found.sample["latency_p95_ms"]
    gaps = found.sample["itl_p99_ms"]
    assert len(gaps) == TOKENS - REQUESTS
    decode = data["request_latency"]["avg"] - data["time_to_first_token"]["avg"]
    assert sum(gaps) / REQUESTS == pytest.approx(decode)
    assert found.identity.seed == 7


def test_genai_puts_together_what_a_chunk_of_the_network_split_and_takes_apart_what_it_joined(tmp_path):
    def rearrange(data):
        request = data["experiments"][0]["requests"][0]
        times, outputs = request["response_timestamps"], request["response_outputs"]
        first, second = outputs[0]["response"], outputs[1]["response"]
        outputs[0]["response"] = first + second  # joined: two tokens at one time
        third = outputs[2]["response"]
        outputs[1]["response"], outputs[2]["response"] = third[:40], third[40:]  # split: of its beginning
        times[2] += 1

    name = RUNS[Tool.GENAI][0]
    before = only(Tool.GENAI, name, tmp_path).sample["itl_p99_ms"]
    ((_, found),) = read(Tool.GENAI, copied(Tool.GENAI, name, tmp_path, beside=rearrange))
    after = found.sample["itl_p99_ms"]
    assert len(after) == len(before)
    assert after[:2] == [0.0, before[0]]
    assert after[2] == pytest.approx(before[1] + before[2])
    assert after[3:] == before[3:]


@pytest.mark.parametrize("tool", [Tool.VLLM_BENCH, Tool.SGLANG, Tool.AIPERF])
def test_gaps_over_several_tokens_are_not_taken_for_those_between_tokens(tool, tmp_path):
    def fewer(data):
        if tool is Tool.AIPERF:
            del data["metrics"]["inter_chunk_latency"]["value"][0]
        else:
            del data["itls"][0][0]

    edits = {"beside": fewer} if tool is Tool.AIPERF else {"edit": fewer}
    ((_, found),) = read(tool, copied(tool, RUNS[tool][0], tmp_path, **edits))
    assert "itl_p99_ms" not in found.sample
    assert "tpot_p95_ms" in found.sample
    assert any(note.startswith("ITL is left out: ") for note in found.notes)


def test_each_fixture_has_its_command():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    files = [path for path in DATA.rglob("*") if path.is_file() and path.name != "README.md"]
    assert files
    assert all(path.stat().st_size < 60_000 for path in files)
    assert all(f"`{path.relative_to(DATA).parts[0]}/" in readme for path in files)
