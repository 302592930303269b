"""What is wrong with a workload's file is told by its place, in one line, before any work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engine import InputError
from engine.bench.workload import check_workload, make_workload
from engine.cli import main
from tests.test_detokenizer import byte_level
from tests.test_workload_files import speaking

OWN = {"token_ids": [3], "output_tokens": 1}
TALK = {**OWN, "conversation": "a"}
MOON = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]}
SHARED = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
HI = {"role": "user", "content": "Hi"}
BAD_ROWS = {
    "no JSON": ([OWN, "{"], "line 2 can't be read as JSON: "),
    "a number": ([OWN, 5], "line 2: 5 must be a JSON object"),
    "too deep": (["[" * 100_000], "can't be read as JSON: "),
    "too many digits": (['{"prompt": ' + "1" * 5000 + "}"], "line 1 can't be read as JSON: "),
    "empty": ([""], "is empty: give a JSON object a line"),
    "an array of nothing": (["[]"], "is empty"),
    "a field": ([OWN, {**OWN, "timestmp": 3}], "line 2 has the field 'timestmp', which is none of prompt, "),
    "nothing to ask": ([{"output_tokens": 1}], "line 1 has nothing to ask: give exactly one of prompt, mess"),
    "two to ask": ([{**OWN, "prompt": "a"}], "line 1 has prompt and token_ids: give exactly one"),
    "no output": ([{"prompt": "a"}], "line 1: output_tokens is missing"),
    "output of 0": ([{**OWN, "output_tokens": 0}], "line 1: output_tokens=0 must be a whole number"),
    "half an output": ([{**OWN, "output_tokens": 1.5}], "line 1: output_tokens=1.5 must be a whole number"),
    "an empty prompt": ([{"prompt": "", "output_tokens": 1}], "line 1: prompt is empty: give at least one"),
    "a prompt of ids": ([{"prompt": [3], "output_tokens": 1}], r"line 1: prompt=\[3\] must be text"),
    "half a pair": (['{"prompt": "\\ud83d", "output_tokens": 1}'], "line 1: prompt=.* is no valid Unicode"),
    "no ids": ([{**OWN, "token_ids": []}], r"line 1: token_ids=\[\] must be a list of whole numbers"),
    "a float among ids": ([{**OWN, "token_ids": [3, 4.0]}], r"line 1: token_ids\[1\]=4.0 must be a whole"),
    "a negative id": ([{**OWN, "token_ids": [-1]}], r"line 1: token_ids\[0\]=-1 must be .* at least 0"),
    "a message alone": ([{"messages": HI, "output_tokens": 1}], "line 1: messages={.*} must be a list"),
    "a message of text": ([{"messages": ["Hi"], "output_tokens": 1}], r"line 1: messages\[0\]='Hi' must be"),
    "parts": ([{"messages": [{**HI, "content": []}], "output_tokens": 1}],
              r"line 1: messages\[0\].content=\[\] must be text"),
    "no role": ([{"messages": [{**HI, "role": ""}], "output_tokens": 1}], r"line 1: messages\[0\].role is"),
    "a time before": ([{**OWN, "timestamp": -1}], "line 1: timestamp=-1 must be a finite number"),
    "no time": (['{"token_ids": [3], "output_tokens": 1, "timestamp": NaN}'], "line 1: timestamp=nan must"),
    "a time for one": ([{**OWN, "timestamp": 1}, OWN], "line 2: timestamp is missing: give it to all rows"),
    "a time for another": ([OWN, {**OWN, "timestamp": 1}], "line 2: timestamp is not in the first row"),
    "a time that follows": ([TALK, {**TALK, "timestamp": 1}], "line 2: timestamp is for rows that begin"),
    "a delay that begins": ([{**TALK, "delay": 1}], "line 1: delay is for rows that follow one"),
    "a delay before": ([TALK, {**TALK, "delay": -1}], "line 2: delay=-1 must be a finite number of at least"),
    "a conversation": ([{**OWN, "conversation": 1.5}], "line 1: conversation=1.5 must be text"),
    "another kind": ([TALK, {"prompt": "a", "output_tokens": 1, "conversation": "a"}],
                     "line 2 has prompt after token_ids: a conversation has one kind throughout"),
    "an own row in a trace": ([MOON, OWN], "line 2 has the field 'token_ids', which is none of timestamp, "),
    "a trace's time": ([{**MOON, "timestamp": "0"}], "line 1: timestamp='0' must be a finite number"),
    "a trace's input": ([{**MOON, "input_length": 0}], "line 1: input_length=0 must be .* at least 1"),
    "a trace's output": ([{**MOON, "output_length": 0}], "line 1: output_length=0 must be .* at least 1"),
    "a trace's blocks": ([{**MOON, "input_length": 513}],
                         "line 1: hash_ids has 1 ids for input_length=513: .* there must be 2"),
    "a hash": ([{**MOON, "hash_ids": [-4]}], r"line 1: hash_ids\[0\]=-4 must be"),
    "no field of a trace": ([MOON, {"hash_ids": [0]}], "line 2: timestamp is missing"),
    "turns": ([SHARED, {"conversations": {}}], "line 2: conversations={} must be a list"),
    "no turns": ([SHARED, {"id": 3}], "line 2: conversations is missing"),
    "a turn": ([{"conversations": ["Hi"]}], r"line 1: conversations\[0\]='Hi' must be an object"),
    "who": ([{"conversations": [{"from": "tool", "value": "a"}]}],
            r"line 1: conversations\[0\]: from='tool' must be one of system, human, user, gpt, "),
    "what": ([{"conversations": [{"from": "human"}]}], r"line 1: conversations\[0\]: value is missing"),
    "a value": ([{"conversations": [{"from": "human", "value": 5}]}], "value=5 must be text"),
    "no answer": ([{"conversations": SHARED["conversations"][:1]}], "has no question with an answer"),
    "an empty answer": ([{"conversations": [SHARED["conversations"][0], {"from": "gpt", "value": " "}]}],
                        "has no question with an answer"),
    "in an array": (["[" + json.dumps(OWN) + ", 3]"], "mine.jsonl, record 2: 3 must be a JSON object"),
}  # fmt: skip


def written(folder: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "mine.jsonl")


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_by_its_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = written(tmp_path, rows)
    for call in (check_workload, make_workload):
        with pytest.raises(InputError, match=message) as error:
            call(file)
        assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    for name, message in {
        "nowhere.jsonl": "workload='nowhere.jsonl' can't be read: No such file or directory",
        "a/chat-3": "workload='a/chat-3' can't be read: No such file",
        str(tmp_path) + "/": "can't be read: Is a directory",
        "a\0.jsonl": "can't be read: embedded null byte",
        "a\udce9.jsonl": "can't be read: ",
        str(tmp_path / "latin.jsonl"): "is no UTF-8: byte 0xe9 at 15",
    }.items():
        with pytest.raises(InputError, match=message):
            make_workload(name)


def test_trace_is_for_files_with_times(tmp_path: Path) -> None:
    for name in (written(tmp_path, [OWN]), "mixed-3"):
        with pytest.raises(
            InputError, match=r"arrivals='trace' must be all, .* or trace for a file that has"
        ):
            check_workload(name, arrivals="trace")
    assert check_workload(written(tmp_path, [{**OWN, "timestamp": 5}]), arrivals="trace") is False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([OWN, TALK, MOON, SHARED, {"messages": [HI], "output_tokens": 2}]), st.data())
def test_whatever_stands_in_a_field_is_work_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], data: st.DataObject
) -> None:
    field = data.draw(st.sampled_from(sorted(row)))
    file = written(tmp_path_factory.mktemp("rows"), [row, {**row, field: data.draw(JSON)}])
    try:
        work = make_workload(file, vocab_size=257, tokenizer=speaking())
    except InputError:
        return
    assert all(item.params.max_new_tokens >= 1 and len(item.prompt) for item in work.items)


def test_bench_replays_a_file_and_says_which(tiny, tmp_path, monkeypatch, capfd):
    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["bench", "--workload", "mine.jsonl", *args])
        return (end.value.code or 0, *capfd.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", math.inf)  # or a busy machine would add lines
    loaded = replace(tiny().loaded, tokenizer=byte_level(257))
    monkeypatch.setattr("engine.engine.load", lambda *_, **__: loaded)
    texts = "Hi", " and more", " yet"
    file = written(tmp_path, [{"prompt": text, "output_tokens": 3, "conversation": 1} for text in texts])
    code, out, err = run("--batch-sizes", "2", "--json", "out.json")
    assert (code, err.strip()) == (0, "")
    assert out.startswith(f"{make_workload(file).name}, arrivals all, on smollm2 ")
    data = json.loads(Path("out.json").read_text())
    assert out.startswith(data["environment"]["workload"])
    assert [row["same_tokens"] for row in data["summary"]] == [3, 3, 3]
    code, out, err = run("--policies", "generate,continuous")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "policies has 'generate', which holds no conversations, and workload='mine.jsonl' has some" in err
    written(tmp_path, [{"prompt": "Hi"}])
    assert run() == (2, "", "error: mine.jsonl, line 1: output_tokens is missing\n")
