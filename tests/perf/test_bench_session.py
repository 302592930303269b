"""What the benchmarks of a session share: the model that is held, the machine's rates, turns, and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine import InputError, load
from perf.backends import Checked, Unavailable
from perf.benchmarks.workloads import fixed
from perf.measure import machine_speed
from perf.measure.case import PerfCase
from perf.measure.costs import model_costs
from perf.measure.interleave import ReplayClock, interleave
from perf.measure.machine_speed import MachineSpeed
from perf.measure.session import BenchSession
from perf.measure.token_check import WrongTokens
from perf.measure.trial import Trial
from tests.perf.test_case import Fixture, Scripted

pytestmark = pytest.mark.usefixtures("imported_for_measuring", "quick_machine_speed")


@pytest.fixture(scope="module")
def bench() -> BenchSession:
    return BenchSession(
        model="random:tiny-llama", dtype=None, rounds=None, quick=False, inject_slowdown=0.0, min_time=0.0
    )


def test_one_model_at_a_time_is_held():
    bench = BenchSession(model=None, dtype="float64", rounds=3, quick=False, inject_slowdown=0.0)
    first = bench.hold("cpu")
    assert bench.hold("cpu") is first
    assert first[0].model.dtype == torch.float64
    assert bench.hold("cpu", "random:tiny-qwen2")[0].spec == "random:tiny-qwen2"
    assert bench.hold("cpu") is not first
    assert not bench.real("cpu")
    assert bench.real("cuda")
    assert PerfCase(bench, Fixture(), None).rounds(9) == 3


def test_int8_is_rounded_by_backends_that_can_and_checked_against_itself(monkeypatch):
    bench = BenchSession(model=None, dtype="int8", rounds=None, quick=False, inject_slowdown=0.0)
    trial = Trial(bench, "peer", "continuous", fixed(3, 8, 4, 256), device="cpu", max_batch_size=2)
    trial.prove()
    assert trial.held.loaded.model.dtype == torch.float32
    as_loaded = model_costs(trial.held.loaded.model)
    assert trial.held.costs.weight_bytes * 4 == as_loaded.weight_bytes
    assert trial.held.costs.kv_bytes * 2 == as_loaded.kv_bytes, "bfloat16"
    assert (trial.setup.dtype, trial.session.engine.config.dtype) == ("int8", "int8")
    assert trial.checked == Checked(3, 0, 3, "its own answers one by one")
    trial.session._alone[1] = (1, 2, 3, 4)
    with pytest.raises(WrongTokens, match="continuous: 1 of 3 answers are not its own answers one by one"):
        trial.prove()
    trial.close()
    with pytest.raises(Unavailable, match="generate: it makes no int8 of a model's weights"):
        Trial(bench, "peer", "generate", fixed(3, 8, 4, 256), device="cpu", max_batch_size=2)


def test_rates_for_the_roofline_leave_the_model_that_is_held_where_it_is():
    bench = BenchSession(model=None, dtype=None, rounds=None, quick=False, inject_slowdown=0.0)
    held = bench.hold("cpu", "random:tiny-qwen2")
    assert bench.machine_speed("cpu").matmul_gflops == 100.0
    assert bench.hold("cpu", "random:tiny-qwen2") is held


def test_the_first_rates_of_a_dtype_are_those_of_the_session(monkeypatch):
    rates = iter(range(1, 9))
    monkeypatch.setattr(machine_speed, "measure", lambda device, dtype: MachineSpeed(next(rates), 10.0))
    bench = BenchSession(model=None, dtype="bfloat16", rounds=None, quick=False, inject_slowdown=0.0)
    assert [bench.measure_speed("cpu", dtype).matmul_gflops for dtype in ("float32", "bfloat16")] == [1, 2]
    assert bench.machine_speed("cpu").matmul_gflops == 2  # of the model's dtype
    assert bench.measure_speed("cpu", "bfloat16").matmul_gflops == 3
    assert bench.machine_speed("cpu").matmul_gflops == 2


def test_rounds_interleave_there_and_back_and_a_failure_is_left_out(bench: BenchSession):
    log: list[str] = []

    def named(name: str, fails_at: int = 99) -> Trial:
        def spoil(run: int, tokens: list[list[int]]) -> None:
            log.append(name)
            if run == fails_at:
                raise InputError("broke")

        backend = Scripted(spoil)
        backend.name = name
        return Trial(bench, "peers", backend, fixed(1, 4, 2, 256), device="cpu", max_batch_size=1)

    trials = [named("a"), named("b", fails_at=1), named("c")]
    failed = interleave(trials, 3)
    assert "".join(log) == "abc" + "cba" + "ac"
    assert [*failed] == ["b"]
    assert [len(trial.rounds) for trial in trials] == [3, 1, 3]


def test_replayed_rounds_are_timed_as_they_were(bench: BenchSession):
    trial = Trial(bench, "peers", Scripted(), fixed(1, 4, 2, 256), device="cpu", max_batch_size=1)
    interleave([trial], 2)
    trial.rounds = [
        replace(round_, seconds=seconds) for seconds, round_ in zip((2.0, 5.0), trial.rounds, strict=True)
    ]
    clock, fixture, stamps = ReplayClock(), Fixture(), []

    def advance(seconds: float) -> None:
        clock.advance(seconds)
        stamps.append(clock.now())

    PerfCase(bench, fixture, None).replay(trial, advance, {"ratio_to_engine": 1.0})
    assert stamps == [2.0, 7.0]
    assert fixture.extra_info["dynamic_batch"]["ratio_to_engine"] == 1.0


# Roofline


def test_costs_of_a_model_that_fits_on_paper():
    # 3 layers, 64 wide, 4 heads and 2 KV heads of 16, MLP 128, 256 ids
    found = model_costs(load("random:tiny-llama").model)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert found.linear_weights == 3 * layer
    assert found.head_weights == 256 * 64
    assert found.weight_bytes == 4 * (3 * layer + 256 * 64)
    assert found.kv_bytes == 2 * 3 * 2 * 16 * 4
    assert found.request_flops(1, 1) == 2 * (3 * layer + 256 * 64) + 4 * 3 * 4 * 16
    tokens = 10 + 5 - 1
    attention = 4 * 3 * 4 * 16 * sum(range(1, tokens + 1))
    assert found.request_flops(10, 5) == 2 * (3 * layer * tokens + 256 * 64 * 5) + attention
    assert found.useful_flops_pct(
        [(10, 5), (10, 5)], 2.0, 1e-9 * found.request_flops(10, 5)
    ) == pytest.approx(100.0)
    step = found.weight_bytes + 8 * 100 * found.kv_bytes
    assert found.decode_bandwidth_pct(8, 100, 1.0, step / 1e6 * 2) == pytest.approx(50.0)


def test_tied_embeddings_are_read_once_a_step():
    tied = load("random:tiny-qwen2").model
    found = model_costs(tied)
    assert found.head_weights == 256 * 64
    assert found.weight_bytes < sum(p.nbytes for p in tied.parameters())
