"""Many coroutines on one engine: right answers, cancellation, and an end that everybody hears of."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from engine import AsyncEngine, Engine, EngineConfig, InputError
from engine.async_engine import MAX_FAILURES
from tests.serving import both, exactly, prompts_of

CLEAN = [prompt for prompt in prompts_of(16) if 255 not in prompt][:8]


def test_many_coroutines_get_the_oracles_answers(tiny):
    oracle = tiny()

    async def run():
        async with AsyncEngine(Engine(oracle.loaded, EngineConfig(max_batch_size=8))) as served:
            return await asyncio.gather(*(served.generate(prompt, exactly(9)) for prompt in prompts_of(20)))

    for prompt, output in zip(prompts_of(20), asyncio.run(run()), strict=True):
        assert list(output.prompt_token_ids) == prompt
        oracle.check(output, 9)


def test_streams_give_every_token_once(tiny):
    oracle = tiny()

    async def collect(served, prompt):
        return [chunk async for chunk in served.stream(prompt, exactly(9))]

    async def run():
        async with AsyncEngine(Engine(oracle.loaded)) as served:
            return await asyncio.gather(*(collect(served, prompt) for prompt in prompts_of(5)))

    for chunks in asyncio.run(run()):
        output = chunks[-1].output
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == output.token_ids
        oracle.check(output, 9)


def test_cancelling_a_coroutine_aborts_its_request_and_no_other(tiny):
    oracle = tiny()
    engine = Engine(oracle.loaded)

    async def run():
        async with AsyncEngine(engine) as served:
            doomed = asyncio.create_task(served.generate([5, 6, 7], exactly(3000)))
            output = await served.generate([8, 9], exactly(9))
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            return output, await served.generate([8, 9, 10], exactly(5))

    for output, tokens in zip(asyncio.run(run()), (9, 5), strict=True):
        oracle.check(output, tokens)
    assert not engine.has_work
    assert sorted(record.finish_reason for record in engine.metrics.records) == ["abort", "length", "length"]


def test_latencies_count_from_when_a_coroutine_asked_not_from_the_end_of_the_step_before(tiny):
    engine = Engine(tiny().loaded)
    step, stepping, release = engine.step, threading.Event(), threading.Event()

    def held():
        stepping.set()
        release.wait(60)
        return step()

    engine.step = held

    async def run():
        async with AsyncEngine(engine) as served:
            first = asyncio.create_task(served.generate([5, 6, 7], exactly(2)))
            await asyncio.to_thread(stepping.wait, 60)
            asked = time.perf_counter()
            second = asyncio.create_task(served.generate([8, 9], exactly(2)))
            await asyncio.sleep(0.05)
            released = time.perf_counter()
            release.set()
            await first
            return asked, (await second).metrics, released

    asked, metrics, released = asyncio.run(run())
    assert asked <= metrics.arrival_s <= released - 0.04
    assert metrics.ttft_ms >= metrics.queue_ms >= (released - metrics.arrival_s) * 1e3


def test_a_stream_may_say_when_its_prompts_arrived(tiny):
    async def run():
        async with AsyncEngine(Engine(tiny().loaded)) as served:
            chunks = served.stream_all([[5, 6], [7]], exactly(2), arrival=1.5)
            return [chunk.output async for _, chunk in chunks if chunk.output is not None]

    assert [output.metrics.arrival_s for output in asyncio.run(run())] == [1.5, 1.5]


def test_bad_input_reaches_its_caller_alone(tiny):
    oracle = tiny()

    async def run():
        async with AsyncEngine(Engine(oracle.loaded)) as served:
            good = asyncio.create_task(served.generate([5, 6], exactly(9)))
            with pytest.raises(InputError, match="empty"):
                await served.generate([])
            return await good

    oracle.check(asyncio.run(run()), 9)


def poison(engine: Engine, token: int = 255) -> None:
    """Have the model raise for every step with this token."""
    run = engine.runner.launch

    def picky(step):
        if any(token in request.tokens for request, _ in step):
            raise RuntimeError("boom")
        return run(step)

    engine.runner.launch = picky


@both
def test_a_step_that_raises_is_nothing_to_those_outside_it(tiny, config):
    """However often it happens, and with nobody else about: the engine then answers a request of its own."""
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=4, **config))
    poison(engine)

    async def run():
        async with AsyncEngine(engine) as served:
            failed = [await served.generate([5, 255], exactly(9)) for _ in range(10)]
            return failed, await asyncio.gather(*(served.generate(prompt, exactly(9)) for prompt in CLEAN))

    failed, outputs = asyncio.run(run())
    assert {(output.finish_reason, output.error) for output in failed} == {("error", "RuntimeError('boom')")}
    for output in outputs:
        oracle.check(output, 9)
    assert not engine.has_work


def test_those_who_share_a_step_with_a_bad_request_go_on(tiny):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8))
    poison(engine)

    async def run():
        async with AsyncEngine(engine) as served:
            waits = [asyncio.create_task(served.generate(prompt, exactly(20))) for prompt in CLEAN]
            bad = await asyncio.gather(*(served.generate([5, 255], exactly(9)) for _ in range(5)))
            return bad, await asyncio.gather(*waits)

    bad, outputs = asyncio.run(run())
    assert {output.error for output in bad} == {"RuntimeError('boom')"}
    for output in outputs:
        oracle.check(output, 20)
    engine.scheduler.memory.check_integrity()
    assert engine.scheduler.memory.pages_used == 0


@both
def test_a_failure_that_passes_ends_what_it_hits_and_the_engine_goes_on(tiny, config, monkeypatch):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))

    def fail(step):
        raise RuntimeError("boom")

    async def run():
        async with AsyncEngine(engine) as served:
            with monkeypatch.context() as patch:
                patch.setattr(engine.runner, "launch", fail)
                hit = await asyncio.gather(*(served.generate(prompt, exactly(9)) for prompt in CLEAN[:2]))
            return hit, await asyncio.gather(*(served.generate(prompt, exactly(9)) for prompt in CLEAN))

    hit, outputs = asyncio.run(run())
    assert {output.error for output in hit} == {"RuntimeError('boom')"}
    for output in outputs:
        oracle.check(output, 9)


@both
def test_an_engine_that_can_compute_nothing_says_so_and_ends(tiny, config):
    engine = Engine(tiny().loaded, EngineConfig(**config))

    def fail(step):
        raise RuntimeError("boom")

    async def run():
        async with AsyncEngine(engine) as served:
            engine.runner.launch = fail
            for count in range(MAX_FAILURES):
                output = await served.generate([5, 6], exactly(9))
                assert (output.finish_reason, output.error) == ("error", "RuntimeError('boom')"), count
            told = []
            for _ in range(3):
                with pytest.raises(RuntimeError, match=r"has ended: 3 steps in a row .*'boom'") as error:
                    await served.generate([5, 6], exactly(9))
                told.append(error.value)
            assert len({*map(id, told)}) == 3, "each is told anew: one error raised for ever would grow"

    asyncio.run(run())
    assert not engine.has_work


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_is_no_exception_ends_the_engine_and_everybody_hears_of_it(tiny, error):
    engine = Engine(tiny().loaded)

    def end(step):
        raise error

    async def run():
        async with AsyncEngine(engine) as served:
            engine.runner.launch = end
            waits = [served.generate([5, 6], exactly(9)) for _ in range(3)]
            outcomes = await asyncio.gather(*waits, return_exceptions=True)
            with pytest.raises(RuntimeError, match="the engine has ended"):
                await served.generate([5])
            return outcomes

    for outcome in asyncio.run(run()):  # a request of that step, or one that was told
        assert getattr(outcome, "finish_reason", None) == "abort" or "has ended" in str(outcome)


def test_an_event_loop_that_closes_takes_its_requests_with_it_and_no_others(tiny):
    """Two threads, a loop each: one is gone while its requests run, wait, and are refused."""
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=4))
    served = AsyncEngine(engine)
    begun = threading.Event()
    kept = []  # what nobody closes

    async def start():
        for _ in range(6):
            kept.append(served.stream([5, 6], exactly(4000)))
            kept[-1].asend(None).send(None)  # as far as its first wait
        await anext(served.stream([7, 8], exactly(4000)))
        begun.set()

    def abandon():
        loop = asyncio.new_event_loop()
        loop.run_until_complete(start())
        kept.append(served.stream([], exactly(4)))
        with contextlib.suppress(RuntimeError, StopIteration):
            asyncio._set_running_loop(loop)
            kept[-1].asend(None).send(None)  # a bad request, whose answer finds no loop
            asyncio._set_running_loop(None)
        loop.close()

    thread = threading.Thread(target=abandon)
    thread.start()
    thread.join()

    async def run():
        return await asyncio.gather(*(served.generate(prompt, exactly(9)) for prompt in CLEAN))

    for output in asyncio.run(run()):
        oracle.check(output, 9)
    served.close()
    assert not served._waiting
    assert not engine.has_work
    assert begun.is_set()


def test_closing_tells_whoever_still_waits(tiny):
    async def run():
        served = AsyncEngine(Engine(tiny().loaded))
        waiting = asyncio.create_task(served.generate([5], exactly(4000)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(served.close)
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), MemoryError()],
)
def test_out_of_memory_makes_steps_smaller(tiny, error):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8))
    run = engine.runner.launch

    def fail(step):
        if sum(count for _, count in step) > 20:
            raise error
        return run(step)

    engine.runner.launch = fail
    for output in engine.generate(prompts_of(12), exactly(9), progress=False):
        oracle.check(output, 9)
    assert engine.scheduler.max_step_tokens <= 20


def test_a_process_ends_well_in_the_middle_of_a_step():
    """Its requests have not finished, nobody waits for them, and nobody has closed the engine."""
    code = """
import asyncio, atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # runs last
from engine import AsyncEngine, Engine, SamplingParams, load
served = AsyncEngine(Engine(load("random:tiny-llama")))

async def main():
    asyncio.create_task(served.generate([1, 2], SamplingParams(max_new_tokens=2000, ignore_eos=True)))
    await asyncio.sleep(0.5)

asyncio.run(main())
print(served._worker.is_alive())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n['MainThread']\n"), done.stderr
    assert "Traceback" not in done.stderr
