"""Files that are not imported: another tool's, none at all, no rounds of one load; and nothing is saved."""

from __future__ import annotations

import json

import pytest

from perf import cli
from perf.importers import Tool
from tests.perf.imported import RUNS, copied, first


@pytest.mark.parametrize("tool", list(Tool))
@pytest.mark.parametrize("other", list(Tool))
def test_a_file_of_another_tool_is_named_with_the_command_that_takes_it(tool, other, refused, tmp_path):
    if tool is other:
        return
    path = first(other, tmp_path)
    code, message = refused(tool, path)
    assert code == 2
    assert message == (f"{path}: is a result of {other}, not of {tool}: python -m perf import {other} {path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: the tool wrote no result"),
        (" \n", "is empty: the tool wrote no result"),
        ('{"a": 1', "is not JSON (line 1: "),
        ("\x00", "is not JSON (line 1: "),
        ("[1, 2]", "has no JSON object in it: it is no file of a load tool"),
        ('{"benchmarks": []}', "is no result of guidellm, nor of another tool that can be imported"),
    ],
)
def test_what_is_no_file_of_a_tool_is_refused(text, message, refused, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(text)
    code, found = refused(Tool.GUIDELLM, path)
    assert code == 3
    assert "some.json" in found
    assert message in found


def test_bytes_that_are_no_text_are_refused(refused, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b"\xff\xfe{}")
    code, message = refused(Tool.AIPERF, path)
    assert (code, "cannot be read" in message) == (3, True)


def test_the_records_alone_are_not_enough_and_what_is_is_named(refused, tmp_path):
    for tool, name in ((Tool.AIPERF, "profile_export.jsonl"), (Tool.GENAI, "profile_export.json")):
        path = first(tool, tmp_path)
        code, message = refused(tool, path.parent / name)
        assert code == 3
        assert f"records alone: name {path.name}" in message


def test_a_file_that_is_not_there_or_is_given_twice_is_a_usage_error(refused, tmp_path):
    path = first(Tool.VLLM_BENCH, tmp_path)
    absent = tmp_path / "nowhere.json"
    message = f"'{absent}' is not there: name a file that the tool wrote"
    assert refused(Tool.VLLM_BENCH, path, absent) == (2, message)
    message = f"'{tmp_path}' is a folder: name a file that the tool wrote"
    assert refused(Tool.VLLM_BENCH, tmp_path) == (2, message)
    (tmp_path / "same.json").symlink_to(path)
    twice = f"'{tmp_path / 'same.json'}' is given twice: a file is one round"
    assert refused(Tool.VLLM_BENCH, path, tmp_path / "same.json") == (2, twice)


def test_a_name_that_cannot_be_is_refused_before_a_file_is_read(refused, tmp_path):
    code, message = refused(Tool.VLLM_BENCH, tmp_path / "nowhere.json", save="a/b")
    assert code == 2
    assert message.startswith("'a/b' is no name to save by")


@pytest.mark.parametrize(
    "args", [["import"], ["import", "wrk", "file", "--save", "main"], ["import", "sglang", "f"]]
)
def test_a_wrong_command_is_a_usage_error(args, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(model_id="other"), "model smollm2 -> other"),
        (lambda data: data.update(total_input_tokens=99), "-> openai-chat, 99 prompt tokens"),
        (lambda data: data.pop("ttfts"), "records of each request -> summaries"),
    ],
)  # fmt: skip
def test_files_of_different_things_are_no_rounds_of_one_run(edit, message, refused, tmp_path):
    one = first(Tool.VLLM_BENCH, tmp_path)
    two = copied(Tool.VLLM_BENCH, RUNS[Tool.VLLM_BENCH][1], tmp_path / "files", edit)
    code, found = refused(Tool.VLLM_BENCH, one, two)
    assert code == 3
    assert found.startswith(f"{one} and {two} are of different things: ")
    assert message in found
    assert found.endswith("; import them apart")


def test_files_of_different_versions_are_no_rounds_of_one_run(refused, tmp_path):
    one = first(Tool.GUIDELLM, tmp_path)
    two = copied(
        Tool.GUIDELLM,
        RUNS[Tool.GUIDELLM][1],
        tmp_path / "files",
        lambda data: data["metadata"].update(guidellm_version="0.8.2"),
    )
    code, message = refused(Tool.GUIDELLM, one, two)
    assert (code, "version 0.8.1 -> 0.8.2" in message) == (3, True)


def test_files_of_different_loads_are_no_rounds_of_one_run(refused, tmp_path):
    one = first(Tool.VLLM_BENCH, tmp_path)
    two = copied(
        Tool.VLLM_BENCH,
        RUNS[Tool.VLLM_BENCH][1],
        tmp_path / "files",
        lambda data: data.update(max_concurrency=8),
    )
    code, message = refused(Tool.VLLM_BENCH, one, two)
    assert (code, message) == (
        3,
        f"{one} and {two} are not of the same loads (imported::load[concurrency:4], "
        "imported::load[concurrency:8]): import rounds of one load together",
    )


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", interrupted)
    path = first(Tool.VLLM_BENCH, tmp_path)
    storage = tmp_path / "storage"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.main(["import", "vllm-bench", str(path), "--save", "main", "--storage", str(storage)])
    assert [found for found in storage.rglob("*") if found.is_file()] == []


def test_a_line_of_a_file_is_named(refused, tmp_path):
    path = copied(Tool.SGLANG, "summaries.jsonl", tmp_path / "files")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["completed"] = "8"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    code, message = refused(Tool.SGLANG, path)
    wanted = f"{path}, line 2: 'completed' is not a whole number of 0 or more"
    assert (code, message) == (3, wanted)
