"""Files of requests: right answers, bad lines, and runs that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from engine import Engine, EngineConfig, InputError, SamplingParams
from engine.batch import run

URL = "/v1/completions"


def line(number, **body):
    asked = {"prompt": [number % 200 + 1, 7, 9], "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    return {"custom_id": f"row-{number}", "method": "POST", "url": URL, "body": asked | body}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def engine(tiny):
    return Engine(tiny("tiny-llama").loaded, EngineConfig(max_batch_size=8))


def test_every_request_has_the_engines_answer(engine, tmp_path):
    source, target = write(tmp_path / "in", [line(n) for n in range(40)]), tmp_path / "out"
    found = run(engine, "tiny", source, target, progress=False)
    assert (found.rows, found.before, found.answered, found.failed) == (40, 0, 40, 0)
    answers = {record["custom_id"]: record for record in read(target)}
    assert len(answers) == 40
    prompts = [line(n)["body"]["prompt"] for n in range(40)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=5, temperature=0), progress=False)
    for n, output in enumerate(outputs):
        response = answers[f"row-{n}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["token_ids"] == list(output.token_ids)
        assert response["body"]["usage"]["completion_tokens"] == len(output.token_ids)


def test_bad_lines_become_errors_and_the_rest_goes_on(engine, tmp_path):
    rows = [
        line(1), "no json", '{"custom_id": "a"}', line(2) | {"method": "GET"}, line(3) | {"url": "/v1/x"},
        line(4) | {"body": []}, line(5, prompt="text"), line(6, n=3), line(7, stream=True), "",
        line(8, prompt=[[5], [6]]), line(9, prompt=[[5], [99999]]), line(10, model="gpt-5"), line(11),
        {**line(12), "custom_id": 5},
    ]  # fmt: skip
    found = run(engine, "tiny", write(tmp_path / "in", rows), tmp_path / "out", progress=False)
    assert (found.rows, found.answered, found.failed) == (14, 3, 11)
    records = {int(record["id"].removeprefix("batch_req_")): record for record in read(tmp_path / "out")}
    assert sorted(records) == [*range(1, 10), *range(11, 16)]
    lines = [n for n, record in records.items() if record["error"]]
    assert sorted(lines) == [2, 3, 4, 5, 6, 15]
    assert all(records[n]["response"] is None for n in lines)
    status = {n: record["response"]["status_code"] for n, record in records.items() if record["response"]}
    assert status == {1: 200, 7: 400, 8: 400, 9: 400, 11: 200, 12: 400, 13: 404, 14: 200}
    assert [len(choice["token_ids"]) for choice in records[11]["response"]["body"]["choices"]] == [5, 5]
    assert not engine.has_work


def test_a_run_goes_on_where_it_was(engine, tmp_path):
    source, target = write(tmp_path / "in", [line(n, temperature=1) for n in range(20)]), tmp_path / "out"
    run(engine, "tiny", source, target, progress=False)
    whole = {record["id"]: record["response"]["body"]["choices"] for record in read(target)}
    kept = target.read_bytes().splitlines(keepends=True)[:7]
    target.write_bytes(b"".join(kept) + b'{"id": "batch_req_9", "custom')
    found = run(engine, "tiny", source, target, progress=False)
    assert (found.rows, found.before, found.answered) == (20, 7, 13)
    records = read(target)
    assert len(records) == 20
    assert {record["id"]: record["response"]["body"]["choices"] for record in records} == whole
    assert run(engine, "tiny", source, target, progress=False).before == 20


@pytest.mark.parametrize(("rows", "kept", "says"), [
    ([line(1)], "not ours\n", "has lines that this did not write"),
    ([line(1)], '{"id": "batch_req_1", "custom_id": "other"}\n', "an answer to line 1 of another file"),
    ([line(1)], '{"id": "batch_req_2", "custom_id": "row-2"}\n', "an answer to line 2 of another file"),
])  # fmt: skip
def test_what_is_no_output_of_this_input_is_left_as_it_is(engine, tmp_path, rows, kept, says):
    target = tmp_path / "out"
    target.write_text(kept)
    with pytest.raises(InputError, match=says):
        run(engine, "tiny", write(tmp_path / "in", rows), target, progress=False)
    assert target.read_text() == kept


def test_an_input_that_is_not_there_or_is_the_output_is_refused(engine, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        run(engine, "tiny", tmp_path / "in", tmp_path / "out", progress=False)
    source = write(tmp_path / "in", [line(1)])
    before = source.read_text()
    with pytest.raises(InputError, match="itself"):
        run(engine, "tiny", source, source, progress=False)
    assert source.read_text() == before


def test_a_failed_request_is_an_error_and_a_dead_engine_ends_the_run(engine, tmp_path, monkeypatch):
    source = write(tmp_path / "in", [line(n) for n in range(4)])
    launch, broken = engine.runner.launch, [True]

    def fail(step):
        if broken[0]:
            raise RuntimeError("no such kernel")
        return launch(step)

    monkeypatch.setattr(engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="can compute nothing"):
        run(engine, "tiny", source, tmp_path / "out", progress=False)
    assert read(tmp_path / "out") == []
    broken[0] = False
    assert run(engine, "tiny", source, tmp_path / "out", progress=False).answered == 4


RUN = """
import sys
from pathlib import Path
from engine import Engine, EngineConfig
from engine.batch import run
config = EngineConfig(max_batch_size=8, device="cpu")
engine = Engine.from_pretrained("random:tiny-llama", config, progress=False)
print("ready", flush=True)
run(engine, "tiny", Path(sys.argv[1]), Path(sys.argv[2]), progress=False)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_fifty_times_loses_nothing_and_doubles_nothing(tiny, tmp_path):
    source, target = write(tmp_path / "in", [line(n, max_tokens=40) for n in range(3000)]), tmp_path / "out"
    chance, kills = random.Random(0), 0
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, source, target], env=env, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        if kills < 50:
            time.sleep(chance.uniform(0.02, 0.25))
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.wait() == 0
            break
    records = read(target)
    assert len(records) == len({record["id"] for record in records}) == 3000
    expected = tmp_path / "whole"
    engine = Engine(tiny("tiny-llama").loaded, EngineConfig(max_batch_size=8))
    run(engine, "tiny", source, expected, progress=False)
    whole = {record["custom_id"]: record["response"]["body"]["choices"] for record in read(expected)}
    assert {record["custom_id"]: record["response"]["body"]["choices"] for record in records} == whole
