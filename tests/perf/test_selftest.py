"""The gate's own test, tested: what it injects is what it says, trials share nothing, and rates are counted
right."""

from __future__ import annotations

import io
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import Engine, EngineConfig, InputError, SamplingParams
from perf.errors import Exit, GateError
from perf.gate import saved_runs, selftest, stats
from perf.gate.comparison import Outcome
from perf.measure import selftest_block
from perf.measure.inject_slowdown import inject_slowdown


class Clock:
    """A clock that moves when told, and a little each time it is read."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now


@pytest.mark.parametrize("late", [False, True])
def test_every_step_takes_longer_by_the_fraction_and_its_tokens_come_later_by_it(monkeypatch, late):
    clock = Clock()
    published = []

    def work(seconds):
        clock.now += seconds

    class Runner:
        def launch(self, batch):
            if late:
                return SimpleNamespace(is_async=True, collect=lambda: work(2.0))
            work(2.0)
            return SimpleNamespace(is_async=False, collect=lambda: None)

    def step(self):
        work(0.5)  # planning
        launched.append(self.runner.launch("batch"))
        assert launched[-1].is_async is late
        while len(launched) > late:
            launched.pop(0).collect()
            published.append(clock.now)
        work(0.3)  # publishing
        return ["chunk"]

    runner, launched = Runner(), []
    engine = SimpleNamespace(runner=runner)
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("perf.measure.inject_slowdown.time", clock)
    with inject_slowdown(0.10):
        assert Engine.step(engine) == ["chunk"]
        first = clock.now
        work(7.0)  # the caller's own time is not stretched
        assert Engine.step(engine) == ["chunk"]
    if late:  # the tokens of the first step come in the second
        assert first == pytest.approx(0.8 * 1.1, abs=1e-4)
        assert published == [pytest.approx(first + 7.0 + 2.5 * 1.1, abs=1e-4)]
    else:
        assert first == pytest.approx(2.8 * 1.1, abs=1e-4)
        assert published == [pytest.approx(at + 2.5 * 1.1, abs=1e-4) for at in (0.0, first + 7.0)]
    assert clock.now == pytest.approx(first + 7.0 + 2.8 * 1.1, abs=1e-4)
    assert Engine.step is step
    assert vars(runner) == {}


def test_a_slowed_engine_gives_the_same_tokens_and_is_itself_again_after_an_error(tiny):
    engine = Engine(tiny("tiny-llama").loaded, EngineConfig(max_batch_size=2))
    own = Engine.step
    prompts, params = [[1, 2, 3], [4, 5]], SamplingParams(max_new_tokens=5)
    plain = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
    with inject_slowdown(0.5):
        assert [output.token_ids for output in engine.generate(prompts, params, progress=False)] == plain
        assert Engine.step is not own
    with pytest.raises(RuntimeError, match="stop"), inject_slowdown(0.5):
        raise RuntimeError("stop")
    assert Engine.step is own
    assert "launch" not in vars(engine.runner)


def test_nothing_negative_can_be_injected():
    with pytest.raises(InputError, match="must be 0 or more"), inject_slowdown(-0.1):
        pass


def made(process, effect, seed):
    """A block's run: 0.3 % of noise between rounds, 0.3 % between processes."""
    rng = np.random.default_rng([seed, process, int(1000 * effect)])
    rate = 100 / (1 + effect) * np.exp(rng.normal(0, 0.003))
    rounds = {"tokens_per_s": (rate * np.exp(rng.normal(0, 0.003, 6))).tolist(), "forward_passes": [64] * 6}
    what = dict.fromkeys(("backend", "model", "workload", "group"), "x")
    extra = {**what, "schema": 1, "fingerprint": {"cpu": "any"}, "rounds": rounds}
    return saved_runs.parse({"benchmarks": [{"fullname": "selftest", "extra_info": extra}]}, "x.json")


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
    def processes(count, folder):
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
    ({"args": ["perf", "--perf-inject-slowdown=0.1"]}, "leave it out"),
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
    assert [args[1] for args, _ in ran].count("--perf-inject-slowdown=0.1") == 4
    assert [args[1] for args, _ in ran].count("--perf-inject-slowdown=0.0") == 4
    assert len({saved for _, saved in ran}) == 8


TALKS = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["effect"] < 0:
        sys.exit("no such effect")
    entry = {"fullname": "it", "stats": {"data": [1 + request["effect"]] * 6}}
    with open(request["path"], "w") as file:
        json.dump({"benchmarks": [entry]}, file)
    print("ready", flush=True)
"""


def test_processes_measure_what_they_are_asked_and_say_why_they_cannot(monkeypatch, tmp_path):
    (tmp_path / "talks.py").write_text(TALKS)
    monkeypatch.setattr(selftest, "BLOCK", (sys.executable, str(tmp_path / "talks.py")))
    with selftest._processes(2, tmp_path) as measure:
        for process, effect in ((0, 0.5), (1, 0.25), (0, 0.0)):
            (benchmark,) = measure(process, effect).benchmarks.values()
            assert benchmark.rounds == {"round_s": (1 + effect,) * 6}
        with pytest.raises(GateError, match=r"a block ended with code 1:\nno such effect\n"):
            measure(1, -1)
        assert measure(0, 0.5).path != measure(0, 0.5).path


def test_a_block_times_its_rounds_anew_for_each_request(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest_block.gc, "freeze", lambda: None)  # for a process that ends soon
    threads = torch.get_num_threads()
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    asked = "".join(json.dumps({"effect": 0.1, "path": str(path)}) + "\n" for path in paths)
    replies = io.StringIO()
    selftest_block.serve(io.StringIO(asked), replies)
    torch.set_num_threads(threads)
    assert replies.getvalue() == "ready\n" * 3
    for path in paths:
        (benchmark,) = saved_runs.load(path).benchmarks.values()
        assert len(benchmark.rounds["tokens_per_s"]) == selftest_block.ROUNDS
        assert not benchmark.problems


@pytest.mark.slow
def test_a_real_block_measures_and_says_why_it_cannot(tmp_path):
    with selftest._processes(1, tmp_path) as measure:
        (benchmark,) = measure(0, 0.1).benchmarks.values()
        assert len(benchmark.rounds["tokens_per_s"]) == selftest_block.ROUNDS
        assert not benchmark.problems
        with pytest.raises(
            GateError, match=r"(?s)a block ended with code 1.*inject_slowdown=-1 must be 0 or more"
        ):
            measure(0, -1)
