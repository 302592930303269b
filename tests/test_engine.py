"""End to end: ends, streams, aborts and faults of requests leave those that share their batch alone."""

from __future__ import annotations

import gc
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch

from engine import Engine, EngineConfig, FinishReason, InputError, LoadedModel, SamplingParams, WorkItem
from engine.request import StreamChunk
from engine.sampling import sample
from tests.serving import both, exactly, prompts_of
from tests.test_detokenizer import byte_level


@both
def test_min_new_tokens_holds_off_eos(tiny, config):
    oracle = tiny()
    prompt = prompts_of(1)[0]
    engine = Engine(oracle.loaded, EngineConfig(**config))
    engine.eos_ids = frozenset(oracle.answer(prompt, 1))
    (output,) = engine.generate([prompt], SamplingParams(20, min_new_tokens=6), progress=False)
    assert len(output.token_ids) >= 6
    assert not engine.eos_ids & set(output.token_ids[:5])


@both
def test_a_seeded_request_draws_the_same_alone_and_in_any_batch(tiny, config):
    loaded = tiny("tiny-llama", "float64").loaded
    own = SamplingParams(12, temperature=1.5, top_k=50, top_p=0.9, seed=7, ignore_eos=True)
    prompts = prompts_of(9)
    (alone,) = Engine(loaded, EngineConfig(**config)).generate([prompts[0]], own, progress=False)
    others = [SamplingParams(i + 3, temperature=i / 4, min_p=0.01 * i, ignore_eos=True) for i in range(8)]
    for batch_size in (2, 9):
        engine = Engine(loaded, EngineConfig(max_batch_size=batch_size, **config))
        mixed = engine.generate(prompts, [own, *others], progress=False)
        assert mixed[0].token_ids == alone.token_ids
    again = Engine(loaded, EngineConfig(**config)).generate(prompts, [own, *others], progress=False)
    assert [o.token_ids for o in again] == [o.token_ids for o in mixed], (
        "seeds from the engine's seed repeat too"
    )


@pytest.fixture(params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def speaker(request, tiny) -> tuple[LoadedModel, list[str]]:
    """A model with a tokenizer, and two prompts for it; the tiny one breaks characters off."""
    if request.param == "tiny":
        return replace(tiny().loaded, tokenizer=byte_level(256)), ["Name three colours.", "naïve café 🙂"]
    loaded = request.getfixturevalue("smollm2")
    chat = Engine(loaded, EngineConfig(kv_memory=2**26)).chat
    asked = "Count from one to ten in words.", "Say 'naïve café 🙂' and nothing else."
    return loaded, [loaded.tokenizer.decode(chat(text)) for text in asked]


@both
def test_streams_in_turn_give_the_text_of_generate(speaker, config):
    loaded, prompts = speaker
    engine = Engine(loaded, EngineConfig(**config))
    params = SamplingParams(24)
    expected = engine.generate(prompts, params, progress=False)
    streams = [engine.stream(prompt, params) for prompt in prompts]
    seen: list[list[StreamChunk]] = [[], []]
    while any(streams):
        for i, stream in enumerate(streams):
            if stream and (chunk := next(stream, None)):
                seen[i].append(chunk)
            else:
                streams[i] = None
    for chunks, output in zip(seen, expected, strict=True):
        assert len(chunks) > 1
        assert "".join(chunk.text for chunk in chunks) == output.text == chunks[-1].output.text
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == output.token_ids
    assert not engine.has_work


@both
def test_stop_strings_end_the_text_before_them(speaker, config):
    loaded, (prompt, _) = speaker
    engine = Engine(loaded, EngineConfig(**config))
    (free,) = engine.generate([prompt], SamplingParams(40, ignore_eos=True), progress=False)
    stop = free.text[10:14]
    params = SamplingParams(40, stop=(stop, "never said"), ignore_eos=True)
    (output,) = engine.generate([prompt], params, progress=False)
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)


@both
@pytest.mark.parametrize("when", [0, 1, 3])
def test_abort_at_any_moment_leaves_the_others_alone(tiny, when, config):
    oracle = tiny("tiny-gemma3")
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=4, **config))
    requests = [engine.add_request(prompt, exactly(8)) for prompt in prompts_of(6)]
    for _ in range(when):
        engine.step()
    gone = [engine.abort(requests[i].id) for i in (1, 5)]  # one that runs, one that waits
    assert [output.finish_reason for output in gone] == ["abort", "abort"]
    assert [len(output.token_ids) for output in gone] == [when, 0]
    assert engine.abort(requests[1].id) is None
    while engine.has_work:
        engine.step()
    for i in (0, 2, 3, 4):
        oracle.check(requests[i].result, 8)


@both
def test_leaving_a_stream_aborts_it(tiny, config):
    engine = Engine(tiny().loaded, EngineConfig(**config))
    stream = engine.stream([5, 6, 7], exactly(50))
    next(stream)
    stream.close()
    assert not engine.has_work
    assert engine.metrics.records[-1].finish_reason == "abort"


@both
def test_a_callback_may_abort_and_may_fail_without_harm_to_others(tiny, config):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))
    prompts = prompts_of(4)

    def broken(chunk: StreamChunk) -> None:
        if chunk.output is None:
            raise KeyError("mine")

    good = engine.add_request(prompts[0], exactly(9))
    bad = engine.add_request(prompts[1], exactly(9), on_chunk=broken)
    victim = engine.add_request(prompts[2], exactly(9))
    killer = engine.add_request(prompts[3], exactly(9), on_chunk=lambda chunk: engine.abort(victim.id))
    while engine.has_work:
        engine.step()
    assert (bad.result.finish_reason, bad.result.error) == ("error", "KeyError('mine')")
    assert victim.result.finish_reason == "abort"
    oracle.check(good.result, 9)
    oracle.check(killer.result, 9)


@both
def test_nan_logits_fail_their_request_alone(tiny, config, monkeypatch):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))
    prompts = [[7] * 9, [8] * 9, [9] * 9]

    def poisoned(logits_RV, requests):
        logits_RV[1] = torch.nan
        return sample(logits_RV, requests)

    requests = [engine.add_request(prompt, exactly(5)) for prompt in prompts]
    with monkeypatch.context() as patch:
        patch.setattr("engine.backends.sample", poisoned)
        patch.setattr("engine.runner.padded.sample", poisoned)
        engine.step()
    while engine.has_work:
        engine.step()
    assert requests[1].result.finish_reason == "error"
    assert "NaN" in requests[1].result.error
    oracle.check(requests[0].result, 5)
    oracle.check(requests[2].result, 5)


@both
def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(tiny, config, monkeypatch):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=2, **config))
    requests = [engine.add_request(prompt, exactly(5)) for prompt in prompts_of(4)]

    def fail(step):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", fail)
        with pytest.raises(RuntimeError, match="boom"):
            engine.step()
    while engine.has_work:
        engine.step()
    assert [request.result.finish_reason for request in requests] == ["error", "error", "length", "length"]
    oracle.check(requests[2].result, 5)


@both
def test_interrupt_gives_back_what_there_is(tiny, capsys, config, monkeypatch):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=3, **config))
    calls, run = iter(range(100)), engine.runner.launch

    def interrupt(step):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return run(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "launch", interrupt)
        outputs = engine.generate(prompts_of(7), [exactly(3)] * 3 + [exactly(9)] * 4, progress=False)
    assert [output.finish_reason for output in outputs] == ["length"] * 3 + ["abort"] * 4
    assert not engine.has_work
    assert "interrupted" in capsys.readouterr().err


def test_requests_arrive_when_due_and_wait_in_line(tiny):
    engine = Engine(tiny().loaded, EngineConfig(policy="sequential"))
    items = [WorkItem((5, 6, 7), exactly(20), arrival_s=at) for at in (0.05, 0.0, 0.0501)]
    start = time.perf_counter()
    outputs = engine.replay(items, progress=False)
    due = [output.metrics.arrival_s - start for output in outputs]
    assert due == pytest.approx([0.05, 0.0, 0.0501], abs=0.02)
    assert outputs[2].metrics.queue_ms >= outputs[0].metrics.latency_ms - 1


def test_memory_bounds_the_batch(tiny):
    oracle = tiny()
    token_bytes = 768
    engine = Engine(oracle.loaded, EngineConfig("dynamic", max_batch_size=8, kv_memory=2 * 30 * token_bytes))
    outputs = engine.generate([[7] * 10] * 5, exactly(20), progress=False)
    assert engine.metrics.counters.kv_bytes_peak == 2 * 29 * token_bytes, "the last token's is not computed"
    assert max(engine.metrics.counters.batch_sizes) == 2
    oracle.check(outputs[4], 20)


BAD = [
    (dict(prompts=[]), "prompts is empty"),
    (dict(prompts=[[]]), r"prompts\[0\] is empty"),
    (dict(prompts=[[3], [3, 256]]), r"prompts\[1\] has token id 256; .* 0 to 255"),
    (dict(prompts=[[3], [-1]]), r"prompts\[1\] has token id -1"),
    (dict(prompts=["text"]), "no tokenizer"),
    (dict(prompts=[3, 4]), r"prompts\[0\]=3 must be text or a list"),
    (dict(prompts=[[1.5]]), "must be text or a list"),
    (
        dict(prompts=[[3] * 4000], params=SamplingParams(200)),
        "needs 4199 positions; random:tiny-qwen2 has 4096",
    ),
    (dict(prompts=[[3]] * 3, params=[SamplingParams()] * 2), "params has 2 entries for 3 prompts"),
    (dict(prompts=[[3]], params=SamplingParams(stop="end")), "no tokenizer: use stop_token_ids"),
    (dict(prompts=[[3]], params=SamplingParams(stop_token_ids=(999,))), "stop_token_ids has token id 999"),
    (dict(prompts=[[3] * 900], params=SamplingParams(200)), "1099 positions of KV memory; it holds 1000"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused_before_any_work(tiny, call, message):
    engine = Engine(tiny().loaded, EngineConfig(kv_memory=1000 * 768, page_size=10))
    if call["prompts"][:1] != [[3] * 900]:
        engine = Engine(tiny().loaded)
    with pytest.raises(InputError, match=message) as error:
        engine.generate(**call, progress=False)
    assert "\n" not in str(error.value)
    assert not engine.has_work
    assert engine.metrics.counters.steps == 0


@both
@pytest.mark.parametrize(("kind", "most"), [("longrope", 32), ("dynamic", 64)])
def test_no_request_reaches_positions_where_rope_would_turn_its_neighbours(roped, config, kind, most):
    oracle = roped(kind)
    engine = Engine(oracle.loaded, EngineConfig(**config))
    prompts = [prompt[: most - 12] for prompt in prompts_of(6, longest=60)]
    assert max(map(len, prompts)) == most - 12
    for output in engine.generate(prompts, exactly(13), progress=False):
        oracle.check(output, 13)
    reason = r" \(of its 64: beyond, its longrope RoPE .*\)" if kind == "longrope" else ""
    with pytest.raises(
        InputError, match=rf"needs {most + 1} positions; llama with {kind} has {most}{reason}: shorten"
    ):
        engine.generate([[3] * most, [4]], exactly(2), progress=False)


def test_ids_of_unfinished_requests_are_unique(tiny):
    engine = Engine(tiny().loaded)
    engine.add_request([1], request_id="mine")
    with pytest.raises(InputError, match="'mine'"):
        engine.add_request([1], request_id="mine")


def test_too_little_memory_for_a_token_is_refused(tiny):
    with pytest.raises(InputError, match="a token takes 768 bytes"):
        Engine(tiny().loaded, EngineConfig(kv_memory=100))


@pytest.mark.parametrize("policy", ["continuous", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_an_engine_that_has_served_thousands_holds_no_more_than_before(tiny, policy):
    engine = Engine(tiny().loaded, EngineConfig(policy=policy, kv_memory=2**20, metrics_window=50))
    params, held = SamplingParams(max_new_tokens=2, ignore_eos=True), []
    tracemalloc.start()
    try:
        for batch in range(6):
            engine.generate([[3 + at % 200, 5, batch] for at in range(200)], params, progress=False)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(held[3:]) - held[2] < 30_000, "bytes; 200 requests took 300,000"
    assert (engine.metrics.requests, len(engine.metrics.records)) == (1200, 50)
