"""What fails in the loop ends the requests whose fault it is; all others get what they get without it."""

from __future__ import annotations

import dataclasses

import pytest

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.kv_pool import PagePool
from tests.serving import both, exactly, prompts_of, use_cuda_backend
from tests.test_detokenizer import byte_level

POISON = 255
WORK = [prompt for prompt in prompts_of(24) if POISON not in prompt][:12]


@pytest.fixture(params=["cpu", "device"])
def packed(request, monkeypatch):
    """`packed(oracle, **options)` gives a packed engine, by the runner of each kind of device."""
    if request.param == "device":
        use_cuda_backend(monkeypatch)
    return lambda oracle, **options: Engine(oracle.loaded, EngineConfig(page_size=4, **options))


def poison(engine: Engine) -> list[int]:
    """Have the model raise for every step with a token POISON; gives the sizes of steps it is asked for."""
    launch, tried = engine.runner.launch, []

    def picky(step):
        tried.append(len(step))
        if any(POISON in request.tokens for request, _ in step):
            raise IndexError("index 255 is out of range")
        return launch(step)

    engine.runner.launch = picky
    return tried


def finish(engine: Engine) -> None:
    """Step to the end, and check that nothing is left of any request."""
    while engine.has_work:
        engine.step()
    memory = engine.scheduler.memory
    if isinstance(memory, PagePool):
        memory.check_integrity()
        assert memory.pages_used == 0
    assert not engine._requests


@pytest.mark.parametrize("bad", [(0,), (3,), (11,), (2, 3, 9), tuple(range(12))], ids=str)
@pytest.mark.parametrize("chunk", [7, 512])
def test_the_request_that_makes_a_step_fail_ends_alone(tiny, packed, bad, chunk):
    oracle = tiny()
    engine = packed(oracle, max_batch_size=8, max_step_tokens=chunk)
    tried = poison(engine)
    prompts = [[*prompt, POISON] if i in bad else prompt for i, prompt in enumerate(WORK)]
    requests = [engine.add_request(prompt, exactly(3 + i % 5)) for i, prompt in enumerate(prompts)]
    for _ in range(200):
        try:
            finish(engine)
            break
        except IndexError:  # a step that had nobody else
            continue
    for i, request in enumerate(requests):
        if i in bad:
            assert request.result.finish_reason == "error"
            assert request.result.error == "IndexError('index 255 is out of range')"
        else:
            oracle.check(request.result, 3 + i % 5)
    if bad == (3,) and chunk == 512:
        assert tried[:7] == [8, 4, 2, 2, 1, 1, 4], "in halves, and each token computed once"
        assert engine.metrics.counters.tokens_computed == sum(
            len(prompt) + 2 + i % 5 for i, prompt in enumerate(WORK) if i != 3
        )


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_request_may_fail_while_others_decode(tiny, packed, at):
    """The tokens that a step before it has chosen on the device are read first."""
    oracle = tiny()
    engine = packed(oracle, max_batch_size=16)
    poison(engine)
    good = [engine.add_request(prompt, exactly(8)) for prompt in WORK[:5]]
    for _ in range(at):
        engine.step()
    bad = engine.add_request([POISON], exactly(8))
    later = engine.add_request(WORK[5], exactly(8))
    finish(engine)
    assert (bad.result.finish_reason, bad.result.token_ids) == ("error", ())
    for request in (*good, later):
        oracle.check(request.result, 8)


def test_generate_gives_the_error_to_its_request(tiny):
    oracle = tiny()
    engine = Engine(oracle.loaded)
    poison(engine)
    outputs = engine.generate([WORK[0], [5, POISON], WORK[1]], exactly(5), progress=False)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    for i in (0, 2):
        oracle.check(outputs[i], 5)


def test_rows_that_are_computed_together_end_together(tiny):
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig("dynamic", max_batch_size=4))
    poison(engine)
    requests = [engine.add_request(prompt, exactly(5)) for prompt in ([5, POISON], *WORK[:7])]
    with pytest.raises(IndexError, match="index 255"):
        engine.step()
    assert [request.result is not None for request in requests] == [True] * 4 + [False] * 4
    finish(engine)
    for request in requests[4:]:
        oracle.check(request.result, 5)


def test_memory_that_runs_out_for_one_request_ends_it_alone(tiny):
    """Less is tried first: fewer tokens a step; then it is that request which does not fit, and no other."""
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(max_batch_size=8))
    run = engine.runner.launch

    def fail(step):
        if any(POISON in request.tokens for request, _ in step):
            raise MemoryError
        return run(step)

    engine.runner.launch = fail
    requests = [engine.add_request(prompt, exactly(5)) for prompt in (WORK[0], [5, POISON], *WORK[1:6])]
    for _ in range(50):
        try:
            finish(engine)
            break
        except MemoryError:
            continue
    assert requests[1].result.error == "MemoryError()"
    for request in (requests[0], *requests[2:]):
        oracle.check(request.result, 5)


@both
def test_an_interrupt_between_two_tokens_leaves_nobody_behind(tiny, config):
    """Those whose tokens had come, and were not handed out, would never have ended."""
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))

    def interrupt(chunk):
        raise KeyboardInterrupt

    requests = [engine.add_request(prompt, exactly(1)) for prompt in WORK[:2]]
    requests.append(engine.add_request(WORK[2], exactly(4), on_chunk=interrupt))
    requests += [engine.add_request(prompt, exactly(1)) for prompt in WORK[3:5]]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.has_work
    assert [str(request.result.finish_reason) for request in requests] == ["length"] * 2 + ["abort"] * 3
    assert requests[3].result.token_ids == oracle.answer(WORK[3], 1), "what it has is handed out"
    later = engine.add_request(WORK[6], exactly(5))
    finish(engine)
    oracle.check(later.result, 5)


@both
def test_a_callback_that_aborts_its_own_request_ends_it_once(tiny, config):
    engine = Engine(tiny().loaded, EngineConfig(**config))
    seen = []

    def enough(chunk):
        seen.append(chunk)
        if len(seen) == 2:
            engine.abort(chunk.request_id)

    request = engine.add_request([5, 6], exactly(9), on_chunk=enough)
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert request.result.finish_reason == "abort"
    assert request.result.token_ids == tiny().answer([5, 6], 2)
    assert [chunk.output for chunk in seen] == [None, None, request.result]
    assert [chunk.output for chunk in chunks] == [None, request.result]
    assert [record.finish_reason for record in engine.metrics.records] == ["abort"]


@both
@pytest.mark.parametrize("way", ["step", "generate", "stream"])
def test_a_callback_may_not_step_the_engine(tiny, config, way):
    """Others would get tokens of two steps in the wrong order; so that request ends, and no other."""
    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))
    call = {
        "step": engine.step,
        "generate": lambda: engine.generate([[3]], exactly(2), progress=False),
        "stream": lambda: next(engine.stream([3])),
    }[way]
    texts = {0: [], 1: []}
    good = [engine.add_request(WORK[i], exactly(9), on_chunk=texts[i].append) for i in (0, 1)]
    bad = engine.add_request(WORK[2], exactly(9), on_chunk=lambda chunk: call())
    while engine.has_work:
        engine.step()
    assert bad.result.finish_reason == "error"
    assert "InputError('step was called within a step" in bad.result.error
    for i, request in enumerate(good):
        oracle.check(request.result, 9)
        assert tuple(token for chunk in texts[i] for token in chunk.token_ids) == request.result.token_ids
    assert engine.step() == [], "and then it may be stepped again"
    with pytest.raises(InputError):
        engine.generate(None)
    assert engine.generate([[3]], exactly(1), progress=False)[0].error is None


class Mumbling:
    """A tokenizer that can't decode some tokens."""

    chat_template = None

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def decode(self, ids, **options) -> str:
        if self.bad & set(ids):
            raise OverflowError("no such piece")
        return "".join(f" {token}" for token in ids)


@both
@pytest.mark.parametrize("streamed", [False, True], ids=["at the end", "as they come"])
@pytest.mark.parametrize("when", [0, 3, 8])
def test_tokens_that_cannot_be_decoded_end_their_request_alone(tiny, config, streamed, when):
    oracle = tiny()
    answers = [oracle.answer(prompt, 9) for prompt in WORK[:4]]
    bad = next(token for token in answers[1][when:] if not any(token in answers[i] for i in (0, 2, 3)))
    engine = Engine(dataclasses.replace(oracle.loaded, tokenizer=Mumbling({bad})), EngineConfig(**config))
    options = {"on_chunk": lambda chunk: None} if streamed else {}
    requests = [engine.add_request(prompt, exactly(9), **options) for prompt in WORK[:4]]
    finish(engine)
    failed = requests[1].result
    assert (failed.finish_reason, failed.error) == ("error", "OverflowError('no such piece')")
    if not streamed:
        assert failed.text is None
        assert failed.token_ids == answers[1], "they are all there, without a text"
    for i in (0, 2, 3):
        oracle.check(requests[i].result, 9)
        assert requests[i].result.text == "".join(f" {token}" for token in answers[i])


def test_a_stream_that_nobody_reads_ends_its_request(tiny):
    engine = Engine(tiny().loaded)
    stream = engine.stream([5, 6, 7], exactly(50))
    assert engine.has_work
    del stream
    assert not engine.has_work
    assert not engine._requests


def test_a_stream_begins_with_its_first_token(tiny):
    oracle = dataclasses.replace(tiny().loaded, tokenizer=byte_level(256))
    chunks = list(Engine(oracle).stream([5, 6, 7], exactly(5)))
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 5
    assert chunks[-1].output is not None


@both
def test_an_error_whose_own_repr_raises_still_ends_its_request_alone(tiny, config):
    class Silent(Exception):
        def __repr__(self):
            raise TypeError("no repr either")

    def fail(chunk):
        raise Silent

    oracle = tiny()
    engine = Engine(oracle.loaded, EngineConfig(**config))
    bad = engine.add_request(WORK[0], exactly(5), on_chunk=fail)
    good = engine.add_request(WORK[1], SamplingParams(5, ignore_eos=True))
    finish(engine)
    assert bad.result.finish_reason == "error"
    assert "Silent" in bad.result.error
    oracle.check(good.result, 5)
