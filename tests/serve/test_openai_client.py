"""OpenAI's own client for Python against the server: whole, streamed, errors, and answers that are left."""

from __future__ import annotations

import asyncio
import time

import pytest

from engine import Engine, SamplingParams
from tests.serve.running import serving

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")

ASKED = {"model": "smollm2", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}


@pytest.fixture(scope="module")
def served(smollm2):
    with serving(Engine(smollm2), name="smollm2", key="secret") as found:
        yield found


@pytest.fixture
def client(served):
    url = f"http://127.0.0.1:{served.port}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as found:
        yield found


def test_a_whole_answer_and_a_stream_are_the_engines(served, client):
    engine = Engine(served.server.loaded.model.engine.loaded)
    params = SamplingParams(max_new_tokens=24, temperature=0)
    (output,) = engine.generate([engine.chat("Say hello.")], params, progress=False)
    whole = client.chat.completions.create(**ASKED, max_completion_tokens=24)
    assert whole.choices[0].message.content == output.text
    assert whole.choices[0].finish_reason == output.finish_reason
    assert whole.usage.prompt_tokens == len(output.prompt_token_ids)
    assert whole.usage.completion_tokens == len(output.token_ids)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**ASKED, max_completion_tokens=24, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == output.text
    assert chunks[-1].usage.completion_tokens == len(output.token_ids)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == output.finish_reason


def test_completions_and_log_probabilities(client):
    asked = {"model": "smollm2", "max_tokens": 5, "temperature": 0}
    found = client.completions.create(prompt=["The capital of France is", "2 + 2 ="], logprobs=1, **asked)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert all(len(choice.logprobs.tokens) == 5 for choice in found.choices)
    chat = client.chat.completions.create(**ASKED, max_tokens=3, logprobs=True, top_logprobs=2)
    assert [len(one.top_logprobs) for one in chat.choices[0].logprobs.content] == [2, 2, 2]
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_errors_are_the_clients_own_classes(served, client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**ASKED, n=3)
    assert error.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASKED, "model": "gpt-5"})
    wrong = openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_a_stream_that_is_closed_ends_its_request(served, client):
    endless = {"extra_body": {"ignore_eos": True}, "max_tokens": 1500}
    stream = client.chat.completions.create(**ASKED, **endless, stream=True)
    next(iter(stream))
    assert served.server.requests == 1
    stream.close()
    until = time.monotonic() + 10
    while served.server.requests or served.server.loaded.model.engine.has_work:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_many_coroutines_are_answered_together(served):
    async def run():
        url = f"http://127.0.0.1:{served.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:

            async def one():
                stream = await client.chat.completions.create(**ASKED, max_tokens=8, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            doomed = asyncio.create_task(one())
            answers = asyncio.gather(*(one() for _ in range(6)))
            await asyncio.sleep(0.05)
            doomed.cancel()
            return await answers

    answers = asyncio.run(run())
    assert len(set(answers)) == 1
    assert answers[0]
