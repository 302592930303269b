"""What load tools send, as it was recorded from each (prompts cut), and what they take from the answer.

guidellm 0.8.1, aiperf 0.13.0, inference-perf 0.7.0 and vLLM's bench client 0.32.0. `python -m
tests.serve.clients` runs the tools themselves.
"""

from __future__ import annotations

import json

import pytest

from engine import Engine, SamplingParams
from engine.openai_api import fields
from tests.serve.running import CHAT, COMPLETIONS, serving

USAGE = {"include_usage": True}
PARTS = [{"type": "text", "text": "1 0 m0 Finish medical want almost away until.\nPush page."}]
ODD = " imprisonment prepares CambodialassesOx bloody\ufffdedes anecd infamous\u03bd\u03c9"
KNOWN = fields.OWN | fields.SAMPLING.keys() | fields.NEUTRAL.keys() | fields.HARMLESS
BODIES = {
    "guidellm chat": {
        "model": "smollm2", "stream": True, "stream_options": USAGE | {"continuous_usage_stats": True},
        "max_completion_tokens": 12, "ignore_eos": True, "messages": [{"role": "user", "content": PARTS}],
    },
    "guidellm completions": {
        "model": "smollm2", "stream": True, "stream_options": USAGE | {"continuous_usage_stats": True},
        "max_tokens": 12, "ignore_eos": True, "prompt": PARTS[0]["text"],
    },
    "aiperf chat": {
        "messages": [{"role": "user", "content": " pray desire her call her wisdom to her So fare you"}],
        "model": "smollm2", "stream": True, "max_completion_tokens": 12, "ignore_eos": True,
        "stream_options": USAGE,
    },
    "aiperf completions": {
        "prompt": " pray desire her call her wisdom to her So fare you", "model": "smollm2", "stream": True,
        "max_tokens": 12, "ignore_eos": True, "stream_options": USAGE,
    },
    "inference-perf chat": {  # the answer of the conversation comes with it
        "model": "smollm2", "messages": [
            {"role": "user", "content": "1 stone lamp green?"}, {"role": "assistant", "content": "So it is."},
        ],
        "max_tokens": 12, "ignore_eos": True, "stream": True, "stream_options": USAGE,
    },
    "inference-perf completions": {
        "model": "smollm2", "prompt": ODD, "max_tokens": 12, "ignore_eos": True, "stream": True,
        "stream_options": USAGE,
    },
    "vllm-bench chat": {
        "model": "smollm2", "messages": [{"role": "user", "content": [{"type": "text", "text": ODD}]}],
        "max_completion_tokens": 12, "stream": True, "stream_options": USAGE, "ignore_eos": True,
        "temperature": 0.0,
    },
    "vllm-bench completions": {
        "model": "smollm2", "prompt": ODD, "repetition_penalty": 1.0, "max_tokens": 12, "logprobs": None,
        "stream": True, "stream_options": USAGE, "ignore_eos": True, "temperature": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def client(smollm2):
    with serving(Engine(smollm2), name="smollm2") as found:
        yield found


def text_of(chunk):
    """The text of a chunk with one choice."""
    (choice,) = chunk["choices"]
    return choice["delta"].get("content", "") if "delta" in choice else choice["text"]


@pytest.mark.parametrize("name", BODIES)
def test_a_tools_request_is_answered_so_that_it_counts_and_times_it_rightly(client, name):
    body = BODIES[name]
    assert body.keys() <= KNOWN
    metrics = client.server.loaded.model.engine.metrics
    before = metrics.tokens_delivered
    reply = client.post(CHAT if "messages" in body else COMPLETIONS, body)
    assert reply.status == 200, reply.body
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == metrics.tokens_delivered - before == 12
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    # The first chunk with choices, vLLM's TTFT, is the first with text, the others'.
    assert all(map(text_of, chunks[:-1]))
    if "messages" in body:
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
    if "continuous_usage_stats" in body["stream_options"]:
        assert len(told) == len(chunks)
        assert told == sorted(set(told))
        assert told[-1] == 12
    else:
        assert told == []


@pytest.mark.parametrize("name", ["vllm-bench chat", "vllm-bench completions"])
def test_greedy_text_is_the_engines(client, name):
    body = BODIES[name]
    engine = Engine(client.server.loaded.model.engine.loaded)
    prompt = body.get("prompt") or engine.chat(ODD)
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    (output,) = engine.generate([prompt], params, progress=False)
    *chunks, _, _ = client.post(CHAT if "messages" in body else COMPLETIONS, body).events
    assert "".join(map(text_of, chunks)) == output.text


def test_what_tools_ask_beside_their_load(client):
    assert client.get("/health").status == 200  # guidellm, before a load
    head = client.ask("HEAD", "/metrics")  # aiperf, and then GET while the load runs
    assert (head.status, head.body) == (200, b"")
    assert client.get("/metrics").status == 200
    prompt = json.dumps({"model": "smollm2", "prompt": ODD}).encode()
    tokenize = client.post("/tokenize", prompt)  # vllm-bench, which goes by its own tokenizer then
    assert tokenize.status == 404
    assert tokenize.json["error"]["type"] == "not_found_error"


def test_the_id_that_a_tool_gives_its_request_comes_back(client):
    own = {"x-request-id": "bench-9a582091-0", "accept": "text/event-stream"}  # vllm-bench; aiperf a UUID
    reply = client.ask("POST", COMPLETIONS, BODIES["aiperf completions"], own)
    assert reply.headers["x-request-id"] == "bench-9a582091-0"
