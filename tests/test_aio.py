"""Many coroutines on one engine: right answers, cancellation, and an end that everybody hears of."""

from __future__ import annotations

import asyncio

import pytest

from engine import AsyncEngine, Engine, EngineConfig, InputError
from tests.test_engine import exactly, prompts_of


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


def test_bad_input_reaches_its_caller_alone(tiny):
    oracle = tiny()

    async def run():
        async with AsyncEngine(Engine(oracle.loaded)) as served:
            good = asyncio.create_task(served.generate([5, 6], exactly(9)))
            with pytest.raises(InputError, match="empty"):
                await served.generate([])
            return await good

    oracle.check(asyncio.run(run()), 9)


def test_the_workers_death_reaches_every_waiter_and_every_later_call(tiny):
    engine = Engine(tiny().loaded)

    def fail(step):
        raise RuntimeError("boom")

    async def run():
        async with AsyncEngine(engine) as served:
            engine.runner.run = fail
            waits = [served.generate([5, 6], exactly(9)) for _ in range(3)]
            found = await asyncio.gather(*waits, return_exceptions=True)
            with pytest.raises(RuntimeError, match="boom"):
                await served.generate([5])
            return found

    outcomes = asyncio.run(run())
    told = [str(o) if isinstance(o, RuntimeError) else o.error for o in outcomes]  # raised, or as the request's own end
    assert all("boom" in text for text in told)


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
    "error", [RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), MemoryError()]
)
def test_out_of_memory_makes_steps_smaller(tiny, error):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8))
    run = engine.runner.run

    def fail(step):
        if sum(count for _, count in step) > 20:
            raise error
        return run(step)

    engine.runner.run = fail
    for output in engine.generate(prompts_of(12), exactly(9), progress=False):
        oracle.check(output, 9)
    assert engine.scheduler.max_step_tokens <= 20
