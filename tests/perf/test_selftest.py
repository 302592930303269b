"""The gate's own test, tested: what it plants is what it says, trials share nothing, and rates are counted
right."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Engine, EngineConfig, SamplingParams
from perf import runs, selftest, stats
from perf.gate import Outcome
from perf.runs import Exit, GateError


class Clock:
    """A clock that moves when told, and a little each time it is read."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now


def test_every_step_takes_longer_by_the_fraction_and_its_tokens_come_later_by_it(monkeypatch):
    clock = Clock()
    published = []

    def work(seconds):
        clock.now += seconds

    def step(self):
        work(0.5)  # planning
        self.runner.run("plan")
        published.append(clock.now)
        work(0.3)  # publishing
        return ["chunk"]

    runner = type("Runner", (), {"run": lambda self, plan: work(2.0)})()
    engine = SimpleNamespace(runner=runner)
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(selftest, "time", clock)
    with selftest.plant(0.10):
        assert Engine.step(engine) == ["chunk"]
    assert published == [pytest.approx(2.5 * 1.1, abs=1e-4)]
    assert clock.now == pytest.approx(2.8 * 1.1, abs=1e-4)
    assert Engine.step is step
    assert vars(runner) == {}


def test_a_planted_engine_gives_the_same_tokens_and_is_itself_again_after_an_error(tiny):
    engine = Engine(tiny("tiny-llama").loaded, EngineConfig(max_batch_size=2))
    own = Engine.step
    prompts, params = [[1, 2, 3], [4, 5]], SamplingParams(max_new_tokens=5)
    plain = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
    with selftest.plant(0.5):
        assert [output.token_ids for output in engine.generate(prompts, params, progress=False)] == plain
        assert Engine.step is not own
    with pytest.raises(RuntimeError, match="stop"), selftest.plant(0.5):
        raise RuntimeError("stop")
    assert Engine.step is own
    assert "run" not in vars(engine.runner)


def test_nothing_negative_can_be_planted():
    with pytest.raises(GateError, match="must be 0 or more"), selftest.plant(-0.1):
        pass


def made(process, effect, seed):
    """A block's run: 0.3 % of noise between rounds, 0.3 % between processes."""
    rng = np.random.default_rng([seed, process, int(1000 * effect)])
    rate = 100 / (1 + effect) * np.exp(rng.normal(0, 0.003))
    rounds = {"tokens_per_s": (rate * np.exp(rng.normal(0, 0.003, 6))).tolist(), "forward_passes": [64] * 6}
    what = dict.fromkeys(("backend", "model", "workload", "group"), "x")
    extra = {**what, "schema": 1, "fingerprint": {"cpu": "any"}, "rounds": rounds}
    return runs.parse({"benchmarks": [{"fullname": "selftest", "extra_info": extra}]}, "x.json")


@pytest.mark.parametrize("trial", [0, 1])
def test_a_trial_is_an_a_b_run_of_fresh_processes_in_abba_order(trial):
    asked = []

    def measure(process, effect):
        asked.append((process, effect))
        return made(process, effect, 0)

    base, heads = selftest.one_trial(measure, [0.0, 0.1], 4, trial)
    assert (len(base), {effect: len(some) for effect, some in heads.items()}) == (4, {0.0: 4, 0.1: 4})
    order = list(dict.fromkeys(process for process, _ in asked))
    assert order == list(range(8))
    only_base = [process for process in order if [e for p, e in asked if p == process] == [0.0]]
    assert only_base == [0, 3, 4, 7]
    first = [next(e for p, e in asked if p == process) for process in (1, 2, 5, 6)]
    assert sorted(first) == [0.0, 0.0, 0.1, 0.1]  # each effect comes first as often


@pytest.fixture
def fake(monkeypatch):
    """Blocks without processes; counts how many were started."""
    started = []

    @contextmanager
    def processes(count):
        started.append(count)
        trial = len(started)
        yield lambda process, effect: made(process, effect, trial)

    monkeypatch.setattr(selftest, "_processes", processes)
    return started


def test_rates_and_visible_effects_are_counted(fake):
    said = []
    report = selftest.selftest([0.0, 0.01, 0.1], 20, advance=said.append)
    nothing, little, much = report.rates
    assert (nothing.regressions, little.regressions, much.regressions) == (0, 0, 20)
    assert set(nothing.outcomes) <= {Outcome.PASS, Outcome.INCONCLUSIVE}
    assert much.failed == {"tokens_per_s": 20}
    assert 0.03 < report.visible["tokens_per_s"] < 0.05  # the tolerance and a little
    assert fake == [8] * 20
    assert (said[0], said[-1], len(said)) == ("trial 1 of 20", "trial 20 of 20", 20)
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert plain["rates"][2]["regressions"] == 20
    assert plain["rates"][2]["bounds"][0] == pytest.approx(0.8316, abs=1e-4)


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0, 0.1684), (1, 0.0013, 0.2487), (19, 0.7513, 0.9987),
                                                   (20, 0.8316, 1)])  # fmt: skip
def test_bounds_are_clopper_and_pearsons(hits, low, high):
    assert stats.binomial_bounds(hits, 20) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("options", "says"), [
    ({"trials": 0}, "trials=0 must be 1 or more"), ({"effects": []}, "must be different fractions"),
    ({"effects": [0.1, 0.1]}, "must be different fractions"),
    ({"effects": [-0.1]}, "must be different fractions"), ({"pairs": 2}, "give 4 or more"),
    ({"args": ["perf", "--perf-plant=0.1"]}, "leave it out"),
])  # fmt: skip
def test_what_makes_no_sense_is_a_usage_error(options, says):
    with pytest.raises(GateError, match=says) as error:
        selftest.selftest(**options)
    assert error.value.code is Exit.USAGE


def test_pytest_arguments_are_measured_in_blocks_of_pytest(monkeypatch, tmp_path):
    ran = []

    def block(args, saved, tree, name):
        ran.append((tuple(args), saved.name))
        return made(len(ran), float(args[-1].split("=")[1]), 0)

    monkeypatch.setattr(selftest.ab, "block", block)
    report = selftest.selftest([0.1], 1, args=["perf/test_x.py"])
    assert report.rates[0].outcomes == (Outcome.FAIL,)
    assert [args[1] for args, _ in ran].count("--perf-plant=0.1") == 4
    assert [args[1] for args, _ in ran].count("--perf-plant=0.0") == 4
    assert len({saved for _, saved in ran}) == 8


def test_a_real_block_measures_and_says_why_it_cannot():
    with selftest._processes(1) as measure:
        (benchmark,) = measure(0, 0.1).benchmarks.values()
        assert len(benchmark.rounds["tokens_per_s"]) == selftest.ROUNDS
        assert not benchmark.problems
        with pytest.raises(GateError, match=r"(?s)a block ended with code 1.*plant=-1 must be 0 or more"):
            measure(0, -1)
