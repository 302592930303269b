"""The body of a request: what it asks for, and what is refused by name."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given, strategies as st

from engine import SamplingParams
from engine.openai_api.api_error import ApiError
from engine.openai_api.fields import HARMLESS, NEUTRAL, parse, read

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return read(parse(json.dumps({"messages": MESSAGES, **fields}).encode()), True, 0.5)


def completion(**fields):
    return read(parse(json.dumps({"prompt": "Hello", **fields}).encode()), False, 0.5)


def refusal(call, **fields):
    with pytest.raises(ApiError) as caught:
        call(**fields)
    assert caught.value.status == 400
    return caught.value


def test_what_is_left_out_is_as_openai_and_the_model_have_it():
    assert chat().params == SamplingParams(temperature=0.5)
    assert completion().params == SamplingParams(max_new_tokens=16, temperature=0.5)
    asked = chat()
    assert (asked.model, asked.stream, asked.include_usage, asked.return_token_ids) == (
        None,
        False,
        False,
        False,
    )
    assert asked.messages == ({"role": "user", "content": "Hello"},)


def test_sampling_parameters_reach_the_engine_by_its_names():
    asked = chat(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, seed=7, stop=["a", "b"],
        stop_token_ids=[5], ignore_eos=True, min_tokens=3, max_completion_tokens=9,
    )  # fmt: skip
    assert asked.params == SamplingParams(
        9, 3, 0.7, 40, 0.9, 0.1, 1.1, ("a", "b"), (5,), ignore_eos=True, seed=7,
    )  # fmt: skip
    assert chat(max_tokens=4, max_completion_tokens=9).params.max_new_tokens == 9
    assert completion(top_k=-1, top_p=0, seed=-1, stop="x").params == SamplingParams(
        16, temperature=0.5, top_k=0, top_p=1e-9, seed=2**63 - 1, stop=("x",)
    )


@pytest.mark.parametrize("name", [*NEUTRAL, *sorted(HARMLESS)])
def test_null_and_what_asks_for_nothing_pass(name):
    for value in (None, *NEUTRAL.get(name, ("anything",))):
        assert chat(**{name: value}).params == chat().params


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_done_here_is_refused_by_name(name):
    error = refusal(chat, **{name: 17})
    assert error.param == name
    assert str(error).startswith(f"{name}=17 is not supported here")


@pytest.mark.parametrize(("fields", "param", "says"), [
    ({"temperature": "hot"}, "temperature", "must be a finite number"),
    ({"temperature": float("nan")}, "temperature", "must be a finite number"),
    ({"temperature": 1e999}, "temperature", "must be a finite number"),
    ({"top_p": 1.5}, "top_p", "from 1e-09 to 1"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be a whole number of at least 1"),
    ({"max_tokens": 2.5}, "max_tokens", "whole number"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens", "min_tokens=9"),
    ({"seed": "x"}, "seed", "whole number"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": [""]}, "stop", "not empty"),
    ({"stop": {"a": 1}}, "stop", "must be a list"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "whole number"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": []}, "stream_options", "an object"),
    ({"model": 3}, "model", "text"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": "Hello"}, "messages", "a list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages[0].role='tool'"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content=None"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "content="),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages", "tool_calls"),
])  # fmt: skip
def test_a_bad_field_is_named(fields, param, says):
    error = refusal(chat, **fields)
    assert error.param == param
    assert says in str(error)


@pytest.mark.parametrize("prompt", [None, "", [], [[]], 5, ["a", [1]], ["a", 1], [1.5], {}])
def test_a_prompt_is_text_or_token_ids_or_several_of_either(prompt):
    if prompt in ("", [[]]):  # for the engine to refuse, which knows the tokenizer
        assert completion(prompt=prompt).prompts
    else:
        assert refusal(completion, prompt=prompt).param == "prompt"
    assert completion(prompt=[3, 4]).prompts == ([3, 4],)
    assert completion(prompt=[[3], [4]]).prompts == ([3], [4])
    assert completion(prompt=["a", "b"]).prompts == ("a", "b")


def test_content_may_come_in_parts_and_a_developer_is_a_system():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "x"},
    ]
    assert chat(messages=messages).messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    )


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
NAMES = st.sampled_from(
    ["messages", "prompt", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "seed",
     "max_tokens", "min_tokens", "temperature", "stop_token_ids", "model", "n", "top_k"]
)  # fmt: skip


@given(fields=st.dictionaries(NAMES, JSON, max_size=5), is_chat=st.booleans())
def test_nothing_but_an_api_error_comes_of_any_json(fields, is_chat):
    body = {"messages": MESSAGES, "prompt": "x"} | fields
    with contextlib.suppress(ApiError):
        read(parse(json.dumps(body).encode()), is_chat, 1.0)
