"""Recording: correct before fast, medians and samples of the good rounds only, nothing that JSON has no word
for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine import WorkItem, load
from perf.backends import Outcome, Setup, Unavailable, timeline
from perf.benchmarks.workloads import fixed
from perf.gate.entries import plain
from perf.gate.saved_runs import parse
from perf.measure.case import PerfCase
from perf.measure.nvml import GpuReading
from perf.measure.session import BenchSession
from perf.measure.token_check import TIE, Judgement, Reference, WrongTokens
from perf.measure.trial import Round, Trial
from tests.oracle import Oracle

pytestmark = pytest.mark.usefixtures("imported_for_measuring", "quick_machine_speed")
Spoil = Callable[[int, list[list[int]]], None]


class Scripted:
    """A backend with the right answers, spoilt by a function of (number of the run, tokens), and made-up
    times."""

    name = "scripted"

    def __init__(
        self, spoil: Spoil = lambda run, tokens: None, exact: bool = True, absent: str | None = None
    ) -> None:
        self.spoil, self.exact, self.absent, self.runs, self.log = spoil, exact, absent, 0, []
        self.keeps_times = True

    def missing(self, device: str) -> str | None:
        return self.absent

    def open(self, setup: Setup) -> Scripted:
        self.oracle = Oracle(setup.loaded)
        return self

    def run(self, items: Sequence[WorkItem]) -> Outcome:
        self.log.append("run")
        tokens = [list(self.oracle.answer(list(item.prompt), item.params.max_new_tokens)) for item in items]
        self.spoil(self.runs, tokens)
        self.runs += 1
        seconds = [[0.1 * self.runs + 0.01 * at for at in range(len(output))] for output in tokens]
        if any(len(out) != item.params.max_new_tokens for out, item in zip(tokens, items, strict=True)):
            return Outcome([tuple(out) for out in tokens], timeline([], [], []).metrics)
        return timeline(items, tokens, seconds, keeps_times=self.keeps_times)

    def close(self) -> None:
        self.log.append("closed")


class Fixture:
    """What of pytest-benchmark's fixture is used."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.has_error = self.disabled = False
        self.group: str | None = None
        self.timed = 0

    def pedantic(self, target: Any, *, setup: Any = None, teardown: Any = None, rounds: int, iterations: int,
                 warmup_rounds: int = 0) -> None:  # fmt: skip
        assert iterations == 1
        for _ in range(warmup_rounds + rounds):
            if setup:
                setup()
            target()
            if teardown:
                teardown()
            self.timed += 1


@pytest.fixture(scope="module")
def bench() -> BenchSession:
    return BenchSession(
        model="random:tiny-llama", dtype=None, rounds=None, quick=False, inject_slowdown=0.0, min_time=0.0
    )


def measure(bench: BenchSession, backend: Any, fixture: Fixture | None = None, **how: Any) -> dict[str, Any]:
    case = PerfCase(bench, fixture or Fixture(), None)
    return case.measure("batch_size", backend, fixed(3, 8, 4, 256), device="cpu", max_batch_size=2, **how)


# Correct before fast


def test_wrong_tokens_fail_before_anything_is_timed_and_nothing_is_saved(bench: BenchSession):
    def spoil(run: int, tokens: list[list[int]]) -> None:
        tokens[1][2] = (tokens[1][2] + 1) % 256

    fixture, backend = Fixture(), Scripted(spoil)
    with pytest.raises(WrongTokens, match=r"scripted: token 2 of requests\[1\] is not the model's choice"):
        measure(bench, backend, fixture)
    assert fixture.has_error
    assert fixture.timed == 0
    assert fixture.extra_info == {}
    assert backend.log == ["run", "closed"]


def test_tokens_that_go_wrong_in_a_later_round_fail_too(bench: BenchSession):
    def spoil(run: int, tokens: list[list[int]]) -> None:
        if run == 3:
            tokens[0][0] = (tokens[0][0] + 1) % 256

    fixture = Fixture()
    with pytest.raises(WrongTokens):
        measure(bench, Scripted(spoil), fixture)
    assert fixture.has_error
    assert fixture.extra_info == {}


def test_a_token_too_few_is_wrong(bench: BenchSession):
    with pytest.raises(WrongTokens, match=r"requests\[0\] asked for 4 tokens, got 3"):
        measure(bench, Scripted(lambda run, tokens: tokens[0].pop() and None))


def test_a_foreign_backend_s_other_tokens_are_counted_instead(bench: BenchSession):
    def spoil(run: int, tokens: list[list[int]]) -> None:
        tokens[1][2] = (tokens[1][2] + 1) % 256

    info = measure(bench, Scripted(spoil, exact=False))
    assert (info["same_tokens"], info["near_ties"], info["checked_requests"]) == (2, 0, 3)


def test_the_reference_accepts_a_near_tie_and_goes_on_from_there():
    loaded = load("random:tiny-llama")
    prompt = list(range(5, 25))
    answer = Oracle(loaded).answer(prompt, 6)
    reference = Reference(loaded)
    assert reference.judge(prompt, answer) == Judgement(0)
    assert reference.judge(prompt, answer).same
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([[*prompt, *answer[:2]]])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    flipped = [*answer[:2], second, *Oracle(loaded).answer([*prompt, *answer[:2], second], 3)]
    wrong = reference.judge(prompt, flipped)
    assert wrong.wrong_at == 2
    assert wrong.gap == pytest.approx(float(logits.max() - logits[second]), rel=1e-4)
    gap = wrong.gap / float(logits.abs().max())
    TIE[torch.float32], kept = gap * 1.01, TIE[torch.float32]
    try:
        assert Reference(loaded).judge(prompt, flipped) == Judgement(ties=1)
    finally:
        TIE[torch.float32] = kept


def test_a_model_that_computes_nan_is_never_right():
    loaded = load("random:tiny-llama")
    loaded.model.lm_head.weight.data[7] = math.nan
    assert Reference(loaded).judge([1, 2, 3], [7, 7]).wrong_at == 0


# What is recorded


def test_everything_of_the_contract_is_recorded_and_is_json(bench: BenchSession):
    fixture = Fixture()
    info = measure(bench, Scripted(), fixture, extra={"note": "x"})
    assert fixture.extra_info == {"dynamic_batch": info}
    assert fixture.group == info["group"] == "batch_size"
    assert not fixture.has_error
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert {key for key, value in info.items() if isinstance(value, dict | list)} == {"fingerprint", "rounds"}
    expected = {"schema": 2, "backend": "scripted", "model": "random:tiny-llama",
                "model_revision": "random-seed-0", "dtype": "float32", "device": "cpu", "policy": "scripted",
                "runner": "scripted", "batch_size": 2,
                "workload": "fixed-3x8+4", "arrivals": "all", "seed": 0, "requests": 3, "rounds_voided": 0,
                "void_reason": None, "gpu_peak_bytes": None, "canary_drift_pct": 0.0,
                 "note": "x"}  # fmt: skip
    assert {key: info.get(key, "absent") for key in expected} == expected
    counts = {name: len(values) for name, values in info["rounds"].items()}
    assert {name: n for name, n in counts.items() if n != 5} == {"tpot_p95_ms": 1, "itl_p99_ms": 1}
    run = parse({"benchmarks": [{"fullname": "t", "extra_info": fixture.extra_info}]}, "x.json")
    assert not run.benchmarks["t"].problems
    assert run.benchmarks["t"].info["note"] == "x"


def test_the_flat_numbers_are_the_median_round_s_and_warm_up_is_dropped(bench: BenchSession):
    info = measure(bench, Scripted(), warmup=2, rounds=5)
    # run k ends at 0.1 k + 0.03 s: the proof is run 1, warm-up 2 and 3
    rates = info["rounds"]["tokens_per_s"]
    assert rates == pytest.approx([12 / (0.1 * k + 0.03) for k in range(4, 9)])
    assert info["tokens_per_s"] == sorted(rates)[2]
    assert info["ttft_p50_ms"] == pytest.approx(600.0)


def test_a_backend_without_times_has_no_ttft(bench: BenchSession):
    backend = Scripted()
    backend.keeps_times = False
    info = measure(bench, backend)
    assert info["ttft_p50_ms"] is None
    assert info["tpot_p50_ms"] is None
    assert "ttft_p95_ms" not in info["rounds"]
    assert info["latency_p95_ms"] > 0
    assert "latency_p95_ms" in info["rounds"]


def test_counters_of_open_load_are_not_gated(bench: BenchSession):
    case = PerfCase(bench, Fixture(), None)
    how: dict[str, Any] = {"device": "cpu", "max_batch_size": 4, "rounds": 1}
    info = case.measure("load", "continuous", "mixed-2", arrivals="poisson:1000", **how)
    assert info["forward_passes"] > 0
    assert "forward_passes" not in info["rounds"]
    assert "useful_flops_pct" not in info
    info = PerfCase(bench, Fixture(), '{"tpot_p50_ms": {"rel": 0.2}}').measure(
        "load", "dynamic", "mixed-2", **how
    )
    assert info["rounds"]["forward_passes"] == [info["forward_passes"]]
    assert info["gate"] == '{"tpot_p50_ms": {"rel": 0.2}}'
    assert info["runner"] == "padded"


def test_rounds_hit_by_a_slowdown_are_voided_and_said_so(bench: BenchSession):
    trial = Trial(bench, "batch_size", Scripted(), fixed(3, 8, 4, 256), device="cpu", max_batch_size=2)
    for _ in range(4):
        trial.before()
        trial.run()
        trial.after()
    hot = GpuReading(slowdown="hardware thermal slowdown")
    good = trial.rounds[2:]

    def heated(round_: Round) -> Round:
        return replace(round_, gpu=hot, sample={**round_.sample, "voided": hot.slowdown})

    trial.rounds[:2] = map(heated, trial.rounds[:2])
    info = trial.info()
    assert (info["rounds_voided"], info["void_reason"]) == (2, "hardware thermal slowdown")
    assert info["rounds"]["tokens_per_s"] == [round_.flat["tokens_per_s"] for round_ in good]
    trial.rounds = list(map(heated, trial.rounds))
    with pytest.raises(RuntimeError, match="all 4 rounds were voided: hardware thermal slowdown"):
        trial.info()


def test_benchmark_disable_checks_the_tokens_and_runs_once(bench: BenchSession):
    class Disabled(Fixture):
        def pedantic(self, target: Any, *, setup: Any, **how: Any) -> None:  # type: ignore[override]
            setup()
            target()

    fixture, backend = Disabled(), Scripted()
    fixture.disabled = True
    measure(bench, backend, fixture, warmup=1)
    assert backend.log == ["run", "run", "closed"]


def test_plain_unwraps_numpy_and_refuses_what_json_has_no_word_for():
    given = {
        "a": np.float64(1.5),
        "b": np.int64(2),
        "c": [np.float32(0.5), None],
        "d": {"e": np.bool_(True)},
        "f": "x",
    }
    found = plain(given)
    assert found == {"a": 1.5, "b": 2, "c": [0.5, None], "d": {"e": True}, "f": "x"}
    assert [type(found[key]) for key in "ab"] == [float, int]
    for bad in (math.nan, math.inf, np.float64("nan"), [1.0, -math.inf], {"deep": math.nan}):
        with pytest.raises(ValueError, match="was not measured"):
            plain({"metric": bad})
    with pytest.raises(ValueError, match="metric is ndarray, which JSON has no word for"):
        plain({"metric": np.zeros(2)})


def test_a_backend_that_is_not_here_is_unavailable_by_name(bench: BenchSession):
    fixture = Fixture()
    with pytest.raises(Unavailable, match="scripted: run setup"):
        measure(bench, Scripted(absent="run setup"), fixture)
    assert fixture.has_error


# How many rounds


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.026, 39), (0.1, 10), (0.2, 5), (30.0, 5), (0.001, 200), (0.0, 200)]
)
def test_rounds_on_a_cpu_fill_the_time_and_are_neither_few_nor_endless(seconds: float, count: int):
    def case(**how: Any) -> PerfCase:
        options = {"model": None, "dtype": None, "rounds": None, "quick": False, "inject_slowdown": 0.0}
        return PerfCase(BenchSession(**(options | how)), Fixture(), None)

    assert case().enough_rounds(None, "cpu", seconds) == count
    assert case(min_time=0.0).enough_rounds(None, "cpu", seconds) == 5
    assert case(min_time=2.0).enough_rounds(None, "cpu", 0.05) == 40
    for told in (case(rounds=7).enough_rounds(3, "cpu", seconds), case().enough_rounds(7, "cpu", seconds)):
        assert told == 7
    assert case(quick=True).enough_rounds(None, "cpu", seconds) == 5
    assert case().enough_rounds(None, "cuda", seconds) == 5


def test_as_many_rounds_are_timed_as_the_proof_s_length_says(
    bench: BenchSession, monkeypatch: pytest.MonkeyPatch
):
    prove = Trial.prove
    monkeypatch.setattr(Trial, "prove", lambda trial: prove(trial) and 0.125)
    monkeypatch.setattr(bench, "min_time", 1.0)
    fixture = Fixture()
    info = measure(bench, Scripted(), fixture, warmup=2)
    assert fixture.timed == 2 + 8
    assert len(info["rounds"]["tokens_per_s"]) == 8
    assert len(measure(bench, Scripted(), rounds=3)["rounds"]["tokens_per_s"]) == 3
