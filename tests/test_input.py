"""Anything that a caller may give: it is served, or it is an InputError of one line, before any work."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from engine import (
    AsyncEngine,
    Engine,
    EngineConfig,
    InputError,
    LoadedModel,
    SamplingParams,
    WorkItem,
    load,
    make_workload,
)
from tests.bad_values import HALF, LONG, NoNumber, Pretender, Raises, RaisingList, Unreadable
from tests.serving import exactly
from tests.test_detokenizer import byte_level


def with_tokenizer(tiny) -> LoadedModel:
    """A tiny model that has a tokenizer, with a chat template."""
    tokenizer = byte_level(257)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return dataclasses.replace(tiny().loaded, tokenizer=tokenizer)


@pytest.fixture
def engine(tiny) -> Engine:
    return Engine(with_tokenizer(tiny))


@pytest.fixture(scope="module")
def untouched(tiny) -> Engine:
    """An engine that tests may share which ask for nothing that it does: `refused` sees to that."""
    return Engine(with_tokenizer(tiny))


def refused(engine: Engine, call, message: str = "") -> None:
    """Assert that a call is an InputError of one short line, with nothing done or kept for it."""
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    str(error.value).encode()
    assert not engine.has_work
    assert not engine._requests
    assert engine.metrics.counters.steps == 0


BAD_PROMPTS = {
    "nothing": (None, "must be text or a list of token ids"),
    "empty text": ("", "is empty"),
    "empty list": ([], "is empty"),
    "empty array": (np.array([]), "is empty"),
    "half a pair": (HALF, r"is no valid Unicode: character 2 is '\\ud83d'"),
    "a byte in argv": ("caf\udce9", "is no valid Unicode: character 3"),
    "bytes": (b"abc", "is bytes: decode it"),
    "bytearray": (bytearray(b"abc"), "is bytes: decode it"),
    "memoryview": (memoryview(b"abc"), "is bytes: decode it"),
    "a number": (7, "must be text or a list"),
    "float": (1.5, "must be text or a list"),
    "floats": ([1.5], "must be text or a list"),
    "nan": ([math.nan], "must be text or a list"),
    "an array of floats": (np.array([1.0]), "must be text or a list"),
    "a tensor of floats": (torch.tensor([1.0]), "must be text or a list"),
    "bools": ([True, False], "must be text or a list"),
    "a bool among ids": ([3, True], "must be text or a list"),
    "an array of bools": (np.array([True]), "must be text or a list"),
    "NumPy's bools": ([np.True_], "must be text or a list"),
    "a tensor of bools": (torch.tensor([True]), "must be text or a list"),
    "words": (["a", "b"], "must be text or a list"),
    "None in it": ([3, None], "must be text or a list"),
    "nested": ([[3], [4]], "must be text or a list"),
    "ragged": ([[3], 4], "must be text or a list"),
    "an array of arrays": (np.ones((2, 2), int), "must be text or a list"),
    "no dimension": (np.array(3), "must be text or a list"),
    "a tensor of no dimension": (torch.tensor(3), "must be text or a list"),
    "a tensor that lies nowhere": (torch.ones(3, dtype=torch.long, device="meta"), "can't be read"),
    "set": ({3, 4}, "must be text or a list"),
    "dict": ({3: 4}, "must be text or a list"),
    "generator": ((i for i in (3, 4)), "must be text or a list"),
    "negative": ([3, -1], "has token id -1; the ids of random:tiny-qwen2 are 0 to 255"),
    "beyond": ([3, 256], "has token id 256"),
    "beyond int64": ([3, 2**63], f"has token id {2**63}"),
    "far beyond": ([3, 10**30], f"has token id {10**30}"),
    "both ends": ([2**63, -1], f"has token id {2**63}"),
    "an array beyond": (np.array([2**64 - 1], np.uint64), f"has token id {2**64 - 1}"),
    "too many digits": ([LONG], "has token id <int>"),
    "a long range": (range(10**12), "has token id 256"),
    "longer than any": (range(10**30), "has token id 256"),
    "too long": ([3] * 5000, r"of 5000 tokens with max_new_tokens=\d+ needs 50\d\d positions; .* has 4096"),
    "a list that raises": (RaisingList([3]), r"can't be read as a list of token ids: KeyError\('mine'\)"),
    "what raises": (Raises(), "must be text or a list"),
    "a class": (list, "can't be read|must be text"),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_refused_in_every_call(untouched, prompt, message):
    engine, encoded = untouched, {}
    if "positions" not in message:  # that is of a request, not of its prompt
        encoded["mine"] = lambda: engine.encode(prompt, name="mine")
    for name, call in {
        **encoded,
        "prompt ": lambda: engine.add_request(prompt),
        "prompt  ": lambda: engine.stream(prompt),
        r"prompts\[1\]": lambda: engine.generate([[3], prompt], progress=False),
        r"prompts\[0\]": lambda: engine.replay([WorkItem(prompt, exactly(1))], progress=False),
    }.items():
        refused(engine, call, f"^{name.strip()}.*({message})")


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7], (5, 6, 7), range(5, 8), np.array([5, 6, 7]), np.array([5, 6, 7], np.uint8),
        torch.tensor([5, 6, 7]), [np.int64(5), 6, np.uint8(7)], [torch.tensor(5), 6, 7],
        np.array([5, 6, 7], object),
    ],
    ids=repr,
)  # fmt: skip
def test_ids_of_any_kind_are_as_good_as_a_list(untouched, prompt):
    tokens = untouched.encode(prompt)
    assert tokens == [5, 6, 7]
    assert {type(token) for token in tokens} == {int}


BAD_CALLS = {
    "no prompts": (lambda e: e.generate(None), "prompts=None must be a list of texts"),
    "a number of prompts": (lambda e: e.generate(5), "prompts=5 must be a list"),
    "no prompt": (lambda e: e.generate([]), "prompts is empty"),
    "prompts of bytes": (lambda e: e.generate(b"abc"), "prompts=b'abc' must be a list"),
    "a dict of prompts": (lambda e: e.generate({"a": 1}), "prompts=.* must be a list"),
    "a set has no order": (lambda e: e.generate({"a"}), "prompts=.* must be a list"),
    "ids that are no list of lists": (lambda e: e.generate([3, 4]), r"prompts\[0\]=3 must be text or a list"),
    "an array of ids": (lambda e: e.generate(np.array([3, 4])), r"prompts\[0\]=.*3.* must be text or a list"),
    "prompts that raise": (lambda e: e.generate(1 // (i - 1) for i in range(3)), "raised ZeroDivisionError"),
    "params by name": (lambda e: e.generate(["a"], "greedy"), "params='greedy' must be SamplingParams, or a"),
    "params of no kind": (lambda e: e.generate(["a"], 0), "params=0 must be SamplingParams"),
    "no list of params": (lambda e: e.generate(["a"], {}), "params={} must be SamplingParams"),
    "empty params": (lambda e: e.generate(["a"], []), "params has 0 entries for 1 prompts"),
    "more params": (lambda e: e.generate(["a"], [exactly(1)] * 2), "params has 2 entries for 1 prompts"),
    "one of the params": (lambda e: e.generate(["a"] * 2, [exactly(1), {}]), r"params\[1\]=.* Sampling"),
    "progress": (lambda e: e.generate(["a"], progress="yes"), "progress='yes' must be True or False"),
    "no items": (lambda e: e.replay(None), "items=None must be a list of WorkItem"),
    "a workload": (
        lambda e: e.replay(make_workload("mixed-2", vocab_size=9)),
        "items=.* must be a list of WorkItem",
    ),
    "a prompt for an item": (lambda e: e.replay(["a"]), r"items\[0\]='a' must be of class WorkItem"),
    "params of an item": (lambda e: e.replay([WorkItem("a", 5)]), r"params\[0\]=5 must be of class Sampling"),
    "due at no time": (lambda e: e.replay([item(math.nan)]), r"items\[0\].arrival_s=nan must be a finite"),
    "never due": (lambda e: e.replay([item(math.inf)]), r"items\[0\].arrival_s=inf must"),
    "due before": (lambda e: e.replay([item(0), item(-1)]), r"items\[1\].arrival_s=-1 must .* of at least 0"),
    "due at a word": (lambda e: e.replay([item("now")]), r"items\[0\].arrival_s='now' must"),
    "params to stream": (lambda e: e.stream("a", {}), "params={} must be of class SamplingParams"),
    "params to add": (lambda e: e.add_request("a", []), r"params=\[\] must be of class SamplingParams"),
    "a callback": (lambda e: e.add_request("a", on_chunk="print"), "on_chunk='print' must be something"),
    "a number as id": (lambda e: e.add_request("a", request_id=5), "request_id=5 must be text"),
    "a list as id": (lambda e: e.add_request("a", request_id=["a"]), r"request_id=\['a'\] must be text"),
    "an empty id": (lambda e: e.add_request("a", request_id=""), "request_id='' must not be empty"),
    "half an id": (lambda e: e.add_request("a", request_id=HALF), "request_id=.* is no valid Unicode"),
    "an arrival": (lambda e: e.add_request("a", arrival="now"), "arrival='now' must be a finite number$"),
    "no arrival": (lambda e: e.add_request("a", arrival=math.nan), "arrival=nan must be a finite number$"),
    "abort a list": (lambda e: e.abort([]), r"request_id=\[\] must be text"),
    "abort nothing": (lambda e: e.abort(None), "request_id=None must be text"),
    "no message": (lambda e: e.chat(None), "messages=None must be text, or a list of messages"),
    "half a message": (lambda e: e.chat(HALF), "message='x .ud83d' is no valid Unicode: character 2"),
    "no content": (lambda e: e.chat([{"role": "user"}]), r"messages.0.\.content=None must be text"),
    "no messages": (lambda e: e.chat(["a"]), "messages.0.='a' must have a role and a content"),
    "config of an engine": (lambda e: Engine(e.loaded, {}), "config={} must be of class EngineConfig"),
    "config by name": (lambda e: Engine(e.loaded, "continuous"), "config='continuous' must be"),
    "a model by name": (lambda e: Engine("smollm2"), "loaded='smollm2' must be .*: take it from engine.load"),
    "a bare model": (lambda e: Engine(e.model), "loaded=Qwen2.* must be of class LoadedModel"),
    "another model": (lambda e: Engine(LoadedModel("x", torch.nn.Linear(1, 1), None, "")), "loaded.model="),
    "a spec": (lambda e: Engine.from_pretrained(None), "model=None must be text"),
    "a spec of bytes": (lambda e: Engine.from_pretrained(b"smollm2"), "model=b'smollm2' must be text"),
    "half a spec": (lambda e: Engine.from_pretrained(HALF), "is no valid Unicode"),
    "nobody's home": (lambda e: Engine.from_pretrained("~nobody-here/x.gguf"), "is no folder, .gguf file"),
    "config to load by": (lambda e: Engine.from_pretrained("smollm2", 5), "config=5 must be of class Engine"),
    "spec to load": (lambda e: load(5), "model=5 must be text"),
    "no device": (lambda e: Engine.from_pretrained("smollm2", EngineConfig(device="meta")), "is not here"),
    "an engine to share": (lambda e: AsyncEngine("smollm2"), "engine='smollm2' must be of class Engine"),
    "goodput of nothing": (lambda e: e.metrics.goodput(None, 1), "ttft_ms=None must be a number of at"),
    "goodput of nan": (lambda e: e.metrics.goodput(1, math.nan), "tpot_ms=nan must be"),
    "goodput below": (lambda e: e.metrics.goodput(1, -1), "tpot_ms=-1 must be a number of at least 0"),
    "a workload's name": (lambda e: make_workload(5, vocab_size=9), "workload=5 must be one of"),
    "its name in bytes": (
        lambda e: make_workload(b"chat-3", vocab_size=9),
        "workload=b'chat-3' must be one of",
    ),
    "its vocabulary": (
        lambda e: make_workload("chat-3", vocab_size=10**30),
        "vocab_size=1000.* must be at most",
    ),
    "its seed": (
        lambda e: make_workload("chat-3", vocab_size=9, seed="x"),
        "seed='x' must be a whole number",
    ),
    "its arrivals": (
        lambda e: make_workload("chat-3", vocab_size=9, arrivals=5),
        "arrivals=5 must be all, poisson:",
    ),
    "its positions": (
        lambda e: make_workload("chat-3", vocab_size=9, max_positions=1.5),
        "max_positions=1.5 must be",
    ),
}  # fmt: skip


def item(arrival_s) -> WorkItem:
    return WorkItem([3], exactly(1), arrival_s)


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_refused_by_name(untouched, call, message):
    refused(untouched, lambda: call(untouched), message)


def test_what_is_refused_leaves_the_engine_as_it_was(engine, tiny):
    plain = Engine(engine.loaded)
    drawn = SamplingParams(8, temperature=1.0, ignore_eos=True)
    for prompt, _ in BAD_PROMPTS.values():
        with pytest.raises(InputError):
            engine.generate([[5], prompt], drawn, progress=False)
    for _, (call, _) in BAD_CALLS.items():
        with pytest.raises(InputError):
            call(engine)
    found, expected = (e.generate([[5, 6]] * 3, drawn, progress=False) for e in (engine, plain))
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]


def test_prompts_may_be_anything_that_has_an_order(engine, tiny):
    lists = [[5, 6], [7, 8]]
    for prompts in (np.array(lists), torch.tensor(lists), (prompt for prompt in lists)):
        outputs = engine.generate(prompts, (params for params in [exactly(4)] * 2), progress=False)
        for output, prompt in zip(outputs, lists, strict=True):
            assert list(output.prompt_token_ids) == prompt
            tiny().check(output, 4)


def test_ids_made_up_here_never_clash_with_a_callers_own(engine):
    for i in range(3):
        engine.add_request([3], exactly(1), request_id=f"request-{i}")
    made = [engine.add_request([3], exactly(1)).id for _ in range(3)]
    assert made == ["request-3", "request-4", "request-5"]
    with pytest.raises(InputError, match="request_id='request-4' is that of an unfinished request"):
        engine.add_request([3], request_id="request-4")


def test_a_request_that_is_not_due_yet_has_its_id_and_may_be_aborted(engine):
    names = []

    def callback(chunk):
        if not names:
            names.append(engine.add_request([5], exactly(1)).id)
            engine.abort("request-2")

    engine.add_request([4], exactly(6), request_id="mine", on_chunk=callback)
    items = [WorkItem([3], exactly(9), arrival_s=at) for at in (0.0, 0.001, 0.1)]
    outputs = engine.replay(items, progress=False)
    assert [output.finish_reason for output in outputs] == ["length", "length", "abort"]
    assert names == ["request-3"]
    assert not engine._requests


def test_coroutines_hear_of_their_own_faults_alone(engine, tiny):
    async def run():
        async with AsyncEngine(engine) as served:
            good = asyncio.create_task(served.generate([5, 6], exactly(40)))
            for prompt, _ in BAD_PROMPTS.values():
                with pytest.raises(InputError):
                    await served.generate(prompt)
            for params in ({}, 0, "greedy", [exactly(3)], Raises()):
                with pytest.raises(InputError, match=r"^params="):
                    await served.generate([5], params)
            return await good, await served.generate([7, 8], exactly(9))

    for output, tokens in zip(asyncio.run(run()), (40, 9), strict=True):
        tiny().check(output, tokens)


@pytest.mark.parametrize(
    "value", [Unreadable(), NoNumber(4), Pretender()], ids=["attributes", "conversion", "class"]
)
@pytest.mark.parametrize("name", ["max_new_tokens", "ignore_eos", "seed"])
def test_values_that_raise_when_looked_at_are_refused(name, value):
    with pytest.raises(InputError, match=f"^{name}="):
        SamplingParams(**{name: value})


def test_ids_of_a_class_of_the_callers_are_plain_text(engine):
    class Name(str):
        def __hash__(self):
            raise RuntimeError("no hash")

    request = engine.add_request([5], exactly(2), request_id=Name("mine"))
    assert (type(request.id), request.id) == (str, "mine")
    assert engine.abort(Name("mine")).request_id == "mine"


@pytest.mark.parametrize("stated", [0, -5])
def test_a_number_of_positions_that_cannot_be_is_refused(tiny, stated):
    model = copy.deepcopy(tiny().loaded.model)
    model.config.max_position_embeddings = stated
    with pytest.raises(InputError, match=r"^max_position_embeddings=.* must be a whole number of at least 1"):
        Engine(dataclasses.replace(tiny().loaded, model=model))


def test_a_page_that_memory_cannot_hold_is_told_by_its_size(tiny):
    with pytest.raises(
        InputError, match="page_size=1099511627776 is too large: a page takes more than kv_memory"
    ):
        Engine(tiny().loaded, EngineConfig(page_size=2**40))
