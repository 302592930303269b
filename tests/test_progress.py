"""Progress: a bar on a terminal; in a file or a CI log a line every ten seconds at most, for all work."""

from __future__ import annotations

import io
import re

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as switches

from engine import Engine, SamplingParams, load
from engine.cli import main
from engine.models import ModelError
from engine.progress import Progress, on_terminal


class Terminal(io.StringIO):
    """A terminal, whose text a test can read."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(parts: int, seconds: float, **options) -> list[str]:
    """Return the lines of a log after work of so many parts, each of which took so long."""
    log, clock = io.StringIO(), Clock()
    with Progress("work", parts, unit="parts", stream=log, clock=clock, **options) as progress:
        for _ in range(parts):
            clock.now += seconds
            progress.advance()
    return log.getvalue().splitlines()


def test_a_log_has_a_line_every_ten_seconds():
    assert lines_of(240, 0.125) == [f"work: {80 * n}/240 parts, {10 * n} s" for n in (1, 2, 3)]
    assert lines_of(4, 7.0) == ["work: 2/4 parts, 14 s", "work: 4/4 parts, 28 s"]
    assert lines_of(3, 3000.0)[-1] == "work: 3/3 parts, 9,000 s"


@pytest.mark.parametrize("delay_s", [0.0, 2.0])
def test_a_log_has_nothing_of_what_takes_less(delay_s):
    assert lines_of(12_000, 9.9 / 12_000, delay_s=delay_s) == []
    assert lines_of(12, 50.0, shown=False) == []


def test_work_that_counts_nothing_says_what_it_is_at():
    log, clock = io.StringIO(), Clock()
    with Progress("Starting", stream=log, clock=clock) as progress:
        stages = {"Loading": 0, "Fetching": 8, "Converting": 3, "Saving": 4, "Reading": 30}
        for what, seconds in stages.items():
            clock.now += seconds
            progress.begin(what)
    assert log.getvalue().splitlines() == ["Converting, 11 s", "Reading, 45 s"]


def test_work_of_several_parts_each_count_by_themselves():
    log, screen, clock = io.StringIO(), Terminal(), Clock()
    for stream in (log, screen):
        with Progress("Starting", stream=stream, clock=clock, redraw_s=1.0) as progress:
            for part in ("first", "second"):
                clock.now += 4
                progress.begin(part, 90, "tokens")
                for _ in range(90):
                    clock.now += 0.09
                    progress.advance()
        assert progress.begin("more") is None  # nothing, once it is left
    assert log.getvalue().splitlines() == ["first: 67/90 tokens, 10 s", "second: 44/90 tokens, 20 s"]
    drawn = re.findall(r"(first|second) .*?(\d+)/90", screen.getvalue())
    assert ("second", "0") in drawn
    assert 8 <= len([part for part, _ in drawn if part == "first"]) <= 12
    assert "more" not in screen.getvalue()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_colours_wished_for_in_a_log_make_no_bar(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert lines_of(160, 0.125) == ["work: 80/160 parts, 10 s", "work: 160/160 parts, 20 s"]


def test_a_terminal_has_a_bar_that_is_gone_in_the_end():
    screen, clock = Terminal(), Clock()
    with Progress("work", 3, unit="parts", stream=screen, clock=clock) as progress:
        assert "work" in screen.getvalue()
        for _ in range(3):
            clock.now += 1
            progress.advance()
        assert "2/3" in screen.getvalue()
        assert "parts" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K"), "the line is erased"


def test_a_bar_waits_for_its_delay_and_is_not_drawn_at_every_step():
    screen, clock = Terminal(), Clock()
    with Progress("work", 9000, stream=screen, clock=clock, delay_s=2.0) as progress:
        for _ in range(1990):
            clock.now += 0.001
            progress.advance()
        assert screen.getvalue() == ""
        for _ in range(1000):
            clock.now += 0.001
            progress.advance()
    assert 5 <= len(re.findall(r"\d+/9000", screen.getvalue())) <= 30


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_erase_is_a_log(monkeypatch, kind):
    monkeypatch.setenv("TERM", kind)
    assert not on_terminal(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert on_terminal(Terminal())
    assert not on_terminal(None)


def test_an_interrupt_is_told_whatever_is_shown():
    log = io.StringIO()
    with Progress("work", 3, shown=False, stream=log) as progress:
        progress.write("interrupted")
    assert log.getvalue() == "interrupted\n"


@pytest.fixture
def colourful(monkeypatch):
    """An environment as of many CI systems: colours are wished for, and standard error is no terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_the_engine_is_silent_in_a_log_unless_it_takes_long(tiny, colourful, capfd, monkeypatch):
    engine = Engine(tiny().loaded)
    prompts = [[5, at] for at in range(3, 43)]
    engine.generate(prompts, SamplingParams(4))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", 0.0)
    monkeypatch.setattr("engine.engine.BAR_AFTER_S", 0.0)
    engine.generate(prompts, SamplingParams(4, ignore_eos=True))
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if not re.fullmatch(r"generate: \d+/40 requests, 0 s", line)] == []
    assert lines[-1].startswith("generate: 40/40")


def test_the_bench_is_silent_in_a_log_unless_it_takes_long(colourful, capfd, monkeypatch):
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", 600.0)  # a busy machine takes ten seconds
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--model", "random:tiny-qwen2", "--workload", "mixed-3", "--policies", "sequential"])
    assert ended.value.code in (None, 0)
    assert capfd.readouterr().err == ""


def test_loading_is_silent_in_a_log_and_says_on_a_terminal_what_it_is_at(colourful, capfd, monkeypatch):
    load("random:tiny-llama", progress=True)
    assert capfd.readouterr() == ("", "")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    Engine.from_pretrained("random:tiny-llama", progress=True)
    assert "Loading random:tiny-llama" in screen.getvalue()
    assert "Preparing random:tiny-llama" in screen.getvalue()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
@pytest.mark.parametrize("progress", [False, True])
def test_the_hubs_own_bars_are_for_terminals(monkeypatch, colourful, terminal, progress):
    found = []

    def look(spec):
        found.append((switches.is_progress_bar_enabled(), not are_progress_bars_disabled()))
        raise ModelError("seen enough")

    monkeypatch.setattr("engine.models.loader.fetch", look)
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    before = switches.is_progress_bar_enabled()
    with pytest.raises(ModelError, match="seen enough"):
        load("some/repository", progress=progress)
    assert found == [(terminal and progress,) * 2]
    assert switches.is_progress_bar_enabled() == before
