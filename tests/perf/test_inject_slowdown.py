"""Which steps a slowdown stretches, and by how much: told by a clock that moves when it is told to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine import Engine, EngineConfig, InputError, SamplingParams
from perf.measure.inject_slowdown import has_chunk, inject_slowdown
from perf.measure.slowdown import Slowdown

DECODES = [(SimpleNamespace(tokens=[1] * 9, computed=8, pending=0), 1)]
PENDING = [(SimpleNamespace(tokens=[1] * 9, computed=9, pending=1), 1)]  # its token is not on the host yet
WHOLE = [(SimpleNamespace(tokens=[1] * 4, computed=0, pending=0), 4)]
PART = [(SimpleNamespace(tokens=[1] * 4, computed=0, pending=0), 3)]
PART_OF_ONE = [(SimpleNamespace(tokens=[1] * 4, computed=2, pending=0), 1)]  # and another token is to come
LAST_OF_ONE = [(SimpleNamespace(tokens=[1] * 4, computed=3, pending=0), 1)]
MIXED = [*DECODES, *PART]


class Clock:
    """A clock that moves when told, and a little each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (0, Slowdown(0.0)),
        (0.05, Slowdown(0.05)),
        ("0.05", Slowdown(0.05)),
        ("0", Slowdown(0.0)),
        ("0.2@chunks", Slowdown(0.2, chunks=True)),
        ("1.5@10", Slowdown(1.5, every=10)),
        ("1.5@1", Slowdown(1.5)),
    ],
)
def test_each_form_means_one_thing(spec: float | str, wanted: Slowdown):
    assert Slowdown.parse(spec) == wanted


@pytest.mark.parametrize(
    "spec",
    [-0.1, float("nan"), float("inf"), "", "x", "nan", "-1@chunks", "0.1@", "0.1@chunk", "0.1@0", "0.1@-3",
     "0.1@1.5", "0.1@²", "@chunks", "0.1@chunks@2", "5%"],
)  # fmt: skip
def test_anything_else_is_refused_and_the_forms_are_named(spec: float | str):
    own = Engine.step
    with (
        pytest.raises(InputError, match=r"must be .* 0 or more.*0\.2@chunks .* 1\.5@10"),
        inject_slowdown(spec),
    ):
        pass
    assert Engine.step is own


def lengths(monkeypatch: pytest.MonkeyPatch, spec: str, batches: list, late: bool = False) -> list[float]:
    """How many times its own length each call of `Engine.step` takes, with one of these batches each.

    late: tokens are read in the call after the one that launched them, where the time goes by.
    """
    clock, launched = Clock(), []

    def work(seconds: float) -> None:
        clock.now += seconds

    class Runner:
        def launch(self, batch: object) -> SimpleNamespace:
            if not late:
                work(2.0)
            return SimpleNamespace(is_async=late, collect=lambda: work(2.0) if late else None)

    def step(self: SimpleNamespace) -> list[str]:
        work(0.5)
        if self.batches:
            launched.append(self.runner.launch(self.batches.pop(0)))
        while len(launched) > (late and bool(self.batches)):
            launched.pop(0).collect()
        work(0.5)
        return []

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("perf.measure.inject_slowdown.time", clock)
    engine, found = SimpleNamespace(runner=Runner(), batches=list(batches)), []
    with inject_slowdown(spec):
        for number in range(len(batches)):
            began, own = clock.now, 3.0
            if late:
                own = 1.0 + 2.0 * (number > 0) + 2.0 * (number == len(batches) - 1)
            Engine.step(engine)
            found.append((clock.now - began) / own)
    return found


def test_chunks_are_stretched_and_decodes_keep_their_pace(monkeypatch: pytest.MonkeyPatch):
    batches = [DECODES, WHOLE, PART, PART_OF_ONE, LAST_OF_ONE, PENDING, MIXED]
    wanted = [1.0, 1.2, 1.2, 1.2, 1.0, 1.0, 1.2]
    assert lengths(monkeypatch, "0.2@chunks", batches) == pytest.approx(wanted, abs=1e-4)


def test_every_n_th_step_is_stretched_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch):
    batches = [DECODES, WHOLE, DECODES, MIXED, DECODES, DECODES, WHOLE]
    wanted = [1.0, 1.0, 2.5, 1.0, 1.0, 2.5, 1.0]
    assert lengths(monkeypatch, "1.5@3", batches) == pytest.approx(wanted, abs=1e-4)
    assert lengths(monkeypatch, "1.5@3", batches[:4]) == pytest.approx(wanted[:4], abs=1e-4)  # counts anew


def test_every_step_is_stretched_alike(monkeypatch: pytest.MonkeyPatch):
    assert lengths(monkeypatch, "0.05", [DECODES, WHOLE, MIXED]) == pytest.approx([1.05] * 3, abs=1e-4)
    assert lengths(monkeypatch, "0", [DECODES, WHOLE, MIXED]) == pytest.approx([1.0] * 3, abs=1e-4)


def test_of_an_async_runner_it_is_the_step_whose_tokens_are_read(monkeypatch: pytest.MonkeyPatch):
    """The second call reads the tokens of the first step, the last call those of the last two."""
    found = lengths(monkeypatch, "1.0@2", [DECODES, DECODES, DECODES, DECODES], late=True)
    # launches 1; reads 1 while 2 is launched; reads 2; reads 3, and then 4 with what follows it
    assert found == pytest.approx([1.0, 1.0, 2.0, (0.5 + 2.0 + 2 * 2.5) / 5.0], abs=1e-4)


@pytest.mark.parametrize("policy", ["continuous", "dynamic"])
def test_a_real_engine_s_steps_are_told_apart(tiny, monkeypatch: pytest.MonkeyPatch, policy: str):
    """Prompts of 6 tokens in steps of 4: the chunks are the first steps, all others decode."""
    config = EngineConfig(max_batch_size=2, max_step_tokens=4, policy=policy, runner="packed")
    engine = Engine(tiny("tiny-llama").loaded, config)
    seen: list[bool] = []
    monkeypatch.setattr(
        "perf.measure.inject_slowdown.has_chunk", lambda batch: seen.append(has_chunk(batch)) or seen[-1]
    )
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    with inject_slowdown("0.01@chunks"):
        engine.generate([list(range(1, 7))], params, progress=False)
    # 4 tokens, 2 tokens and the first token out, then a token a step
    assert seen == [True, True, False, False, False, False]


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
    with pytest.raises(InputError, match="must be a fraction of 0 or more"), inject_slowdown(-0.1):
        pass
