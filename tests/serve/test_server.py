"""The server on a real socket: answers, streams, errors, and who may ask."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from engine import Engine, EngineConfig, SamplingParams
from engine.serve.prometheus import Prometheus, joined
from tests.serve.running import CHAT, COMPLETIONS, serving

ASKED = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
HELLO = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def tiny_engine(tiny):
    return Engine(tiny("tiny-llama").loaded, EngineConfig(max_batch_size=4))


@pytest.fixture(scope="module")
def client(tiny_engine):
    with serving(tiny_engine) as found:
        yield found


@pytest.fixture(scope="module")
def chatting(smollm2):
    with serving(Engine(smollm2), name="smollm2") as found:
        yield found


def greedy(client, prompt, tokens):
    """What the engine gives in process."""
    params = SamplingParams(max_new_tokens=tokens, temperature=0, ignore_eos=True)
    return Engine(client.server.loaded.model.engine.loaded).generate([prompt], params, progress=False)[0]


def test_a_completion_has_the_engines_tokens_and_counts_them(client):
    reply = client.post(COMPLETIONS, ASKED)
    assert reply.status == 200
    (choice,) = reply.json["choices"]
    assert choice["token_ids"] == list(greedy(client, [5, 6, 7], 8).token_ids)
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert (choice["finish_reason"], choice["index"]) == ("length", 0)
    usage = {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert reply.json["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert (reply.json["object"], reply.json["model"]) == ("text_completion", "tiny")


def test_prompts_of_one_request_are_choices_of_one_answer(client):
    prompts = [[5, 6, 7], [9], [8, 3]]
    whole = client.post(COMPLETIONS, ASKED | {"prompt": prompts}).json
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    wanted = [list(greedy(client, prompt, 8).token_ids) for prompt in prompts]
    assert [choice["token_ids"] for choice in whole["choices"]] == wanted
    streamed = client.post(COMPLETIONS, ASKED | {"prompt": prompts, "stream": True}).events
    found = [[], [], []]
    for told in streamed[:-1]:
        (choice,) = told["choices"]
        found[choice["index"]] += choice["token_ids"]
    assert found == wanted


def test_a_stream_is_what_clients_rely_on(client):
    reply = client.post(COMPLETIONS, ASKED | {"stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert len({(told["id"], told["created"], told["model"], told["object"]) for told in chunks}) == 1
    assert [told["choices"][0]["finish_reason"] for told in chunks] == [None] * 7 + ["length"]
    assert "usage" not in chunks[0]
    told = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert told == list(greedy(client, [5, 6, 7], 8).token_ids)


def test_a_chat_streams_text_with_the_role_in_its_first_chunk(chatting):
    whole = chatting.post(CHAT, HELLO).json
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"]
    *chunks, done = chatting.post(CHAT, HELLO | {"stream": True}).events
    assert done == "[DONE]"
    deltas = [told["choices"][0]["delta"] for told in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert all(delta.get("content") for delta in deltas[:-1])
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert {told["object"] for told in chunks} == {"chat.completion.chunk"}
    reasons = [told["choices"][0]["finish_reason"] for told in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]


def test_a_chat_without_a_limit_gets_the_room_that_there_is(chatting):
    stop = chatting.post(CHAT, {k: v for k, v in HELLO.items() if k != "max_tokens"}).json
    assert stop["choices"][0]["finish_reason"] == "stop"


def test_usage_goes_on_where_it_was_asked_for_with_every_chunk(client):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, usage, _ = client.post(COMPLETIONS, ASKED | options).events
    assert [told["usage"]["completion_tokens"] for told in chunks] == list(range(1, 9))
    assert usage["usage"]["total_tokens"] == 11


def test_log_probabilities_are_those_of_the_engine(chatting):
    text = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, "logprobs": 2}
    told = chatting.post(COMPLETIONS, text).json["choices"][0]
    params = SamplingParams(max_new_tokens=4, temperature=0, logprobs=2)
    (output,) = Engine(chatting.server.loaded.model.engine.loaded).generate(
        [text["prompt"]], params, progress=False
    )
    wanted = [one.logprob for one in output.logprobs]
    assert told["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert "".join(told["logprobs"]["tokens"]) == told["text"]
    assert told["logprobs"]["text_offset"][1] == len(told["logprobs"]["tokens"][0])
    assert all(len(top) in (2, 3) for top in told["logprobs"]["top_logprobs"])
    whole = chatting.post(CHAT, HELLO | {"logprobs": True, "top_logprobs": 1}).json["choices"][0]
    content = whole["logprobs"]["content"]
    assert "".join(one["token"] for one in content).startswith(whole["message"]["content"])
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in content)
    *chunks, _ = chatting.post(CHAT, HELLO | {"logprobs": True, "top_logprobs": 1, "stream": True}).events
    streamed = [one for told in chunks for one in told["choices"][0]["logprobs"]["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]


def test_a_stop_string_ends_the_text_before_it(chatting):
    asked = {"prompt": "1 2 3 4 5 6", "max_tokens": 30, "temperature": 0}
    text = chatting.post(COMPLETIONS, asked).json["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    told = chatting.post(COMPLETIONS, asked | {"stop": stop}).json["choices"][0]
    assert told["text"] == text[: text.index(stop)]
    assert (told["finish_reason"], told["stop_reason"]) == ("stop", stop)


def test_the_same_seed_draws_the_same_tokens(client):
    drawn = ASKED | {"temperature": 1.0, "seed": 11}
    one, two, other = (client.post(COMPLETIONS, drawn | {"seed": seed}).json for seed in (11, 11, 12))
    assert one["choices"] == two["choices"] != other["choices"]


@pytest.mark.parametrize(("body", "status", "param"), [
    (b"{", 400, None), ({"prompt": [99999]}, 400, "prompt"), ({"prompt": []}, 400, "prompt"),
    ({"prompt": "text"}, 400, "prompt"), ({"prompt": [1], "n": 2}, 400, "n"),
    ({"prompt": [1], "max_tokens": 10**9}, 400, "prompt"), ({"prompt": [1], "stop": "x"}, 400, "stop"),
    ({"prompt": [1], "stop_token_ids": [99999]}, 400, "stop_token_ids"),
    ({"prompt": [1], "model": "gpt-5"}, 404, "model"), ({"prompt": [[1]] * 65}, 400, "prompt"),
    (b" " * ((4 << 20) + 1), 413, None),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_before_any_headers_of_a_stream(client, body, status, param, stream):
    reply = client.post(COMPLETIONS, body | {"stream": stream} if isinstance(body, dict) else body)
    assert reply.status == status
    error = reply.json["error"]
    assert error["param"] == param
    assert error["message"]
    assert client.server.requests == 0


def test_paths_and_methods_that_are_none_are_errors_of_the_api(client):
    for reply, status in ((client.get("/v1/nothing"), 404), (client.get(CHAT), 405)):
        assert reply.status == status
        assert reply.json["error"]["type"]


def test_models_are_told(client):
    (model,) = client.get("/v1/models").json["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json == model
    assert client.get("/v1/models/other/one").status == 404


def test_a_body_of_no_stated_length_is_counted_as_it_comes(client):
    with socket.create_connection(("127.0.0.1", client.port)) as peer:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        peer.sendall(head.encode())
        try:
            for _ in range(6):
                peer.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        except OSError:
            pass  # it has answered already
        assert b" 413 " in peer.recv(1000).split(b"\r\n")[0]


def test_a_client_that_leaves_takes_its_request_with_it(client):
    for stream in (True, False):
        body = json.dumps(ASKED | {"max_tokens": 900, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", client.port)) as peer:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            peer.sendall(head.encode() + body)
            while client.server.requests == 0:
                time.sleep(0.001)
            if stream:
                assert b"200" in peer.recv(100)
        until = time.monotonic() + 10
        while client.server.requests or client.server.loaded.model.engine.has_work:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert client.server.loaded.model.engine.metrics.records[-1].finish_reason == "abort"
    client.server.loaded.model.engine.scheduler.memory.check_integrity()


def test_who_comes_when_the_queue_is_full_is_told_to_come_later(tiny_engine):
    with serving(tiny_engine, max_requests=1) as client:
        replies = []
        long = ASKED | {"max_tokens": 900}
        thread = threading.Thread(target=lambda: replies.append(client.post(COMPLETIONS, long)))
        thread.start()
        while client.server.requests == 0:
            time.sleep(0.001)
        refused = client.post(COMPLETIONS, ASKED)
        thread.join()
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert replies[0].status == 200
        assert client.post(COMPLETIONS, ASKED).status == 200


def test_an_answer_that_takes_too_long_is_ended(tiny_engine):
    with serving(tiny_engine, timeout_s=0.05) as client:
        long = ASKED | {"max_tokens": 1500}
        reply = client.post(COMPLETIONS, long)
        assert reply.status == 504
        *_, error, done = client.post(COMPLETIONS, long | {"stream": True}).events
        assert "longer than" in error["error"]["message"]
        assert done == "[DONE]"
    assert not tiny_engine.has_work


def test_without_the_key_only_health_answers(tiny_engine):
    with serving(tiny_engine, key="secret") as client:
        assert client.get("/health").status == 200
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                reply = client.ask("GET", path, headers=headers)
                assert reply.status == 401
                assert reply.json["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", authorization="Bearer secret").status == 200
        assert client.post(COMPLETIONS, ASKED).status == 401


def test_a_server_on_this_machine_answers_to_its_own_names_alone(client):
    assert client.get("/health", host="evil.example:8000").status == 400
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
        assert client.get("/health", host=host).status == 200


def test_while_the_model_is_loaded_nobody_is_served():
    with serving(None) as client:
        for reply in (client.get("/health"), client.post(COMPLETIONS, ASKED), client.get("/v1/models")):
            assert reply.status == 503
            assert "loaded" in reply.json["error"]["message"]


def test_request_ids_are_echoed_or_made(client):
    assert client.get("/health", **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {client.get("/health", **{"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b")}
    assert len(made) == 2


def test_metrics_have_vllms_names_and_the_engines_numbers(tiny_engine):
    with serving(tiny_engine) as client:
        before = tiny_engine.metrics.tokens_delivered
        began = time.perf_counter()
        client.post(COMPLETIONS, ASKED)
        waited = time.perf_counter() - began
        found = {s.name: s for f in parse(client.get("/metrics").body.decode()) for s in f.samples}
    assert found["vllm:generation_tokens_total"].value == before + 8
    assert found["vllm:num_requests_running"].value == 0
    assert found["vllm:time_to_first_token_seconds_count"].value == 1
    ttft_s = found["vllm:time_to_first_token_seconds_sum"].value
    assert tiny_engine.metrics.records[-1].ttft_ms / 1e3 <= ttft_s < waited
    assert found["vllm:inter_token_latency_seconds_count"].value == 7
    assert found["vllm:kv_cache_usage_perc"].labels == {"model_name": "tiny"}


def test_pages_of_several_engines_are_one(tiny_engine):
    pages = [Prometheus(tiny_engine, "tiny", replica).text() for replica in ("a", "b")]
    kinds = [line for line in joined(pages).decode().splitlines() if line.startswith("# TYPE ")]
    assert len(kinds) == len(set(kinds)) == pages[0].count(b"# TYPE ")
    found = [sample for family in parse(joined(pages).decode()) for sample in family.samples]
    assert len(found) == 2 * sum(len(family.samples) for family in parse(pages[0].decode()))
    labels = [sample.labels for sample in found if sample.name == "vllm:num_requests_running"]
    assert labels == [{"model_name": "tiny", "replica": "a"}, {"model_name": "tiny", "replica": "b"}]


def test_the_log_has_the_counts_of_a_request_and_not_its_prompt(chatting, caplog):
    with caplog.at_level("INFO", "engine.serve"):
        chatting.post(CHAT, HELLO)
        until = time.monotonic() + 10
        while not caplog.records:  # it comes after the answer
            assert time.monotonic() < until
            time.sleep(0.01)
    line = caplog.records[-1].getMessage()
    assert "tokens_out=" in line
    assert "ttft_ms=" in line
    assert "hello" not in caplog.text.lower()


def test_a_connection_is_kept(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    for _ in range(3):
        connection.request("POST", COMPLETIONS, json.dumps(ASKED | {"stream": True}))
        reply = connection.getresponse()
        assert reply.read().endswith(b"data: [DONE]\n\n")
        assert not reply.will_close
    connection.close()
