"""The backend `http` against a server that behaves as real ones do, and worse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest

from engine import SamplingParams, WorkItem
from perf.backends import Setup
from perf.backends.http import backend
from perf.backends.http.backend import Http, HttpSession
from perf.servers.ready import TargetError
from perf.servers.target import KEY, Target
from tests.perf.scripted_server import Script, scripted_server, words

TOKENS = 6


@pytest.fixture(autouse=True)
def _however_busy_this_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LATE_MS", 1e6)


def ids(count: int = 4, **how: Any) -> list[WorkItem]:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [WorkItem(list(range(20 + i, 40 + i)), params, **how) for i in range(count)]


def texts(count: int = 4, **how: Any) -> list[WorkItem]:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [WorkItem(f"prompt number {i} of many", params, **how) for i in range(count)]


@contextmanager
def session(script: Script, places: int = 8, **target: Any) -> Iterator[HttpSession]:
    with scripted_server(script) as url:
        found = Http().open(
            Setup(None, "cpu", "float32", places, options={"target": Target.parse(url, **target)})
        )
        try:
            yield found
        finally:
            found.close()


def test_ids_are_sent_and_told() -> None:
    script = Script()
    with session(script) as one:
        one.reset()
        outcome = one.run(ids())
        assert one.served_model == "scripted"
        assert one.fingerprint["api"] == "completions, token ids"
        assert one.fingerprint["refused_fields"] == "none"
        assert one.fingerprint["tells"] == "token ids and usage"
        assert one.fingerprint["ends_early"] == "no"
        assert [len(tokens) for tokens in outcome.tokens] == [TOKENS] * 4
        assert outcome.metrics.counters.output_tokens == 4 * TOKENS
        assert outcome.metrics.counters.prompt_tokens_cached == 4 * 3
        assert outcome.exact
        assert outcome.voided is None
        checked = one.check(ids(), None)
        assert (checked.same, checked.checked) == (4, 4)
        assert checked.against == "the server's answers one by one"
    asked = script.seen[-1]
    assert asked["stream"] is True
    assert asked["temperature"] == 0
    assert asked["ignore_eos"] is True
    assert asked["max_tokens"] == TOKENS
    assert asked["model"] == "scripted"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("usage_in", ["own", "finish"])
def test_frames_of_any_kind(newline: str, split: int | None, usage_in: str) -> None:
    with session(Script(newline=newline, split=split, usage_in=usage_in)) as one:
        outcome = one.run(ids(2))
        assert outcome.voided is None
        flat = outcome.metrics.flat()
        assert flat["requests"] == 2
        assert flat["output_tokens"] == 2 * TOKENS


def test_what_a_server_refuses_is_left_out_and_said() -> None:
    refused = ("stream_options", "max_completion_tokens", "return_token_ids", "return_tokens", "seed")
    script = Script(refuse=refused, only="chat")
    with session(script) as one:
        one.run(texts())
        assert one.fingerprint["api"] == "chat, text"
        said = one.fingerprint["refused_fields"]
        assert said is not None
        assert sorted(said.split(", ")) == sorted(set(refused) - {"max_completion_tokens"})
        assert one.fingerprint["tells"] == "text alone"
    asked = script.seen[-1]
    assert asked["max_tokens"] == TOKENS
    assert not set(refused) & set(asked)
    assert asked["ignore_eos"] is True


def test_what_stands_for_a_refused_field_is_tried() -> None:
    script = Script(refuse=("ignore_eos", "seed"))
    with session(script) as one:
        one.run(ids())
        assert one.fingerprint["refused_fields"] == "ignore_eos, seed"
    assert json.loads(script.seen[-1]["generation_config"]) == {"eos_token_id": -1, "do_sample": False}


def test_what_stands_for_it_may_be_refused_too() -> None:
    with session(Script(refuse=("ignore_eos", "generation_config"))) as one:
        one.run(ids())
        assert one.fingerprint["refused_fields"] == "ignore_eos, generation_config"


@pytest.mark.parametrize("names", [("ignore_eos",), ("seed", "return_token_ids")])
def test_a_refusal_without_a_name_costs_no_other_field(names: tuple[str, ...]) -> None:
    with session(Script(refuse_silently=names)) as one:
        one.run(ids())
        assert set(str(one.fingerprint["refused_fields"]).split(", ")) == set(names)


def test_a_server_that_takes_no_ids_is_asked_in_text() -> None:
    items = [WorkItem(item.prompt, item.params, source="text " * 9) for item in ids()]
    with session(Script(takes_ids=False)) as one:
        one.run(items)
        assert one.fingerprint["api"] == "completions, text"


def test_ids_without_a_tokenizer_and_a_server_without_ids() -> None:
    with session(Script(takes_ids=False)) as one, pytest.raises(TargetError, match="prompt must be a string"):
        one.run(ids())


def test_an_end_before_its_time_is_told() -> None:
    with session(Script(ends_at=3)) as one:
        outcome = one.run(ids())
        assert outcome.extra["ended_early"] == 4
        assert not outcome.exact
        assert "does not honour ignore_eos" in str(one.fingerprint["ends_early"])


def test_chunks_of_several_tokens_have_no_itl() -> None:
    with session(Script(together=2)) as one:
        flat = one.run(ids()).metrics.flat()
        assert flat["itl_p50_ms"] is None
        assert flat["tpot_p50_ms"] is not None


def test_tokens_are_timed_as_they_come() -> None:
    with session(Script(first_ms=50, gap_ms=20)) as one:
        one.run(ids(1))
        records = one.run(ids(1)).metrics.records
        assert records[0].ttft_ms >= 50
        assert len(records[0].itl_ms) == TOKENS - 1
        assert sum(records[0].itl_ms) > 4 * 20  # one may have been late already
        assert records[0].tpot_ms == pytest.approx(sum(records[0].itl_ms) / (TOKENS - 1))
        assert records[0].queue_ms is None


def test_a_round_begins_its_prompts_anew_and_the_same_anywhere() -> None:
    seen = []
    for _ in range(2):
        script = Script()
        with session(script) as one:
            for _ in range(2):
                one.reset()
                one.run(ids())
        seen.append([asked["prompt"] for asked in script.seen if asked["max_tokens"] == TOKENS])
    assert seen[0] == seen[1]
    first, second = seen[0][:4], seen[0][4:]
    assert all(a[:8] != b[:8] and a[8:] == b[8:] for a, b in zip(first, second, strict=True))
    assert all(prompt[:8] == first[0][:8] for prompt in first)


def test_no_more_than_its_places_are_on_their_way() -> None:
    with session(Script(first_ms=30), places=2) as one:
        records = list(one.run(ids(6)).metrics.records)
    starts = sorted(record.arrival_s for record in records)  # each is due when its place is free
    assert starts[2] - starts[0] >= 0.03
    assert starts[4] - starts[0] >= 0.06


def test_requests_are_sent_when_they_are_due() -> None:
    items = [WorkItem(item.prompt, item.params, arrival_s=0.03 * i) for i, item in enumerate(ids())]
    with session(Script(), places=1) as one:
        one.run(items)
        outcome = one.run(items)
    arrivals = [record.arrival_s for record in outcome.metrics.records]
    assert [round(at - arrivals[0], 6) for at in arrivals] == [0.0, 0.03, 0.06, 0.09]
    assert outcome.extra["send_lag_p99_ms"] >= 0


def test_a_round_that_was_sent_late_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LATE_MS", -1.0)
    with session(Script()) as one:
        for _ in range(3):  # it is the client's fault, and ends nothing
            assert "requests were sent late" in str(one.run(ids()).voided)


def test_a_conversation_waits_for_the_answer_and_repeats_it() -> None:
    first = texts(1)[0]
    second = WorkItem(
        "and then?", first.params, 0.02, follows=0, source=({"role": "user", "content": "and then?"},)
    )
    script = Script()
    with session(script, api="chat") as one:
        records = list(one.run([first, second]).metrics.records)
    assert records[1].arrival_s - records[0].finished_s >= 0.02
    asked = script.seen[-1]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "user"]
    assert asked[1]["content"] == "".join(words(asked[:1], TOKENS))
    assert asked[2]["content"] == "and then?"


def test_a_conversation_of_ids_goes_on_with_the_answers_ids() -> None:
    first = ids(1)[0]
    second = WorkItem([90, 91], first.params, follows=0)
    script = Script()
    with session(script) as one:
        outcome = one.run([first, second])
    asked = [seen["prompt"] for seen in script.seen][-2:]
    assert asked[1] == [*asked[0], *outcome.tokens[0], 90, 91]


def test_a_failed_request_voids_its_round_and_the_second_ends_it() -> None:
    script = Script()
    with session(script) as one:
        one.run(ids())
        script.fail_every = 3
        outcome = one.run(ids())
        assert "HTTP 500: out of luck" in str(outcome.voided)
        with pytest.raises(TargetError, match="2 rounds failed"):
            one.run(ids())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"stop_after": 2}, "without a finish_reason"),
        ({"error_after": 2}, "the worker died"),
        ({"done": False, "finish": False}, "without a finish_reason or .DONE."),
        ({"only": "nothing"}, "HTTP 404: Not Found"),
    ],
)
def test_a_server_that_answers_nothing_whole_is_refused_before_timing(how: dict[str, Any], said: str) -> None:
    with session(Script(**how)) as one, pytest.raises(TargetError, match=said):
        one.run(ids())


def test_all_requests_of_a_round_failing_ends_it_at_once() -> None:
    script = Script()
    with session(script) as one:
        one.run(ids())
        script.stop_after = 2
        with pytest.raises(TargetError, match=r"requests\[0\] of 4 broke off: the answer was cut short"):
            one.run(ids())


def test_a_server_that_is_gone() -> None:
    with scripted_server(Script()) as url:
        one = Http().open(Setup(None, "cpu", "float32", 4, options={"target": Target.parse(url)}))
        one.run(ids())
    with pytest.raises(TargetError, match="does not answer"):
        one.run(ids())
    one.close()


def test_a_key_is_sent_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted_server(Script(key="secret")) as url:
        with pytest.raises(TargetError, match=f"wants a key .HTTP 401.: give it in .{KEY}"):
            Http().open(Setup(None, "cpu", "float32", 4, options={"target": Target.parse(url)}))
        monkeypatch.setenv(KEY, "wrong")
        with pytest.raises(TargetError, match="refuses the key"):
            Http().open(Setup(None, "cpu", "float32", 4, options={"target": Target.parse(url)}))
        monkeypatch.setenv(KEY, "secret")
        target = Target.parse(url)
        assert "secret" not in repr(target)
        one = Http().open(Setup(None, "cpu", "float32", 4, options={"target": target}))
        one.run(ids())
        assert "secret" not in str(one.fingerprint)
        one.close()


def test_a_server_that_hangs_up_after_each_answer() -> None:
    with session(Script(hangs_up=True), places=2) as one:
        for _ in range(5):
            assert one.run(ids(8)).voided is None
        assert one.check(ids(8), None).same == 8


def test_what_a_stale_connection_did_not_answer_is_asked_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with session(Script()) as one:

        def stale(*args: object, **options: object) -> None:
            raise aiohttp.ClientOSError(104, "Connection reset by peer")

        monkeypatch.setattr(one.connection._session, "get", stale)
        assert one._wait(one.connection.get("/v1/models")).status == 200


def test_a_busy_server_is_asked_again_before_timing() -> None:
    with session(Script(busy=2)) as one:
        assert one.run(ids()).voided is None


def test_the_servers_own_counters_are_told_by_how_they_grew() -> None:
    page = (
        '# TYPE vllm:num_preemptions counter\nvllm:num_preemptions_total{{model="m"}} {answers}\n'
        "# TYPE vllm:request_queue_time_seconds histogram\n"
        'vllm:request_queue_time_seconds_bucket{{le="+Inf"}} {answers}\n'
        "vllm:request_queue_time_seconds_sum {answers}\nvllm:request_queue_time_seconds_count {answers}\n"
    )
    with session(Script(metrics=page)) as one:
        extra = one.run(ids()).extra
    assert extra["server_preemptions"] == 4
    assert extra["server_queue_mean_ms"] == 1000


def test_without_the_client_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf.backends.http.backend.find_spec", lambda name: None)
    assert Http().missing("cpu") == "pip install 'dynamic-batch[http]'"


def test_without_a_target_it_says_what_it_needs() -> None:
    with pytest.raises(TargetError, match="--target"):
        Http().open(Setup(None, "cpu", "float32", 4))
