"""How commands end: bytes that are no text, an output that takes not all or no more, Ctrl-C; a line each."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from engine.output import INTERRUPTED, NO_READER, USAGE, Column, Output
from tests.test_detokenizer import byte_level

ROOT = str(Path(__file__).parents[1])
SPOKEN = """
import dataclasses, sys
import engine.engine
from engine import load
from engine.cli import main
from tests.test_detokenizer import byte_level

def spoken(spec, **options):
    print("LOADED", file=sys.stderr, flush=True)
    return dataclasses.replace(load("random:tiny-qwen2"), tokenizer=byte_level(257))

engine.engine.load = spoken
main()
"""
MODEL = [sys.executable, "-c", SPOKEN]  # the program, with a model that speaks; without it, what needs none
PLAIN = [sys.executable, "-m", "engine"]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def run(command: list, input: bytes = b"", **environment: str) -> tuple[int, bytes, str]:
    """The exit code, what was printed, and the errors, of which no line is of a traceback."""
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, input=input, capture_output=True, env=env, timeout=120)
    error = done.stderr.decode()
    assert "Traceback" not in error, error
    assert "Exception ignored" not in error, error
    return done.returncode, done.stdout, error


BYTES = {
    "prompt": (["generate", b"caf\xe9"], r"prompt='caf\\udce9' is no valid Unicode: character 3 is"),
    "stop": (["generate", "hi", "--stop", b"\xff"], r"stop='\\udcff' is no valid Unicode"),
    "model": (["generate", "hi", "--model", b"\xff"], r"model='\\udcff' is no valid Unicode"),
    "device": (["generate", "hi", "--device", b"\xff"], r"device='\\udcff' is no valid Unicode"),
    "dtype": (["generate", "hi", "--dtype", b"\xff"], r"dtype='\\udcff' must be one of auto"),
    "workload": (["bench", "--workload", b"\xff"], r"workload='\\udcff' must be one of"),
    "arrivals": (["bench", "--arrivals", b"\xff"], r"arrivals='\\udcff' must be all"),
    "policies": (["bench", "--policies", b"\xff"], r"policies has '\\udcff'"),
    "sizes": (["bench", "--batch-sizes", b"\xff"], r"batch-sizes='\\udcff' must be whole numbers"),
    "plot": (["bench", "--plot", b"\xff"], r"plot='\\udcff' must end in"),
}


@pytest.mark.parametrize(("arguments", "message"), BYTES.values(), ids=BYTES)
def test_arguments_that_are_no_text_are_one_line(capfd, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main([os.fsdecode(argument) for argument in arguments])
    out, error = capfd.readouterr()
    assert (exit.value.code, out, error.count("\n")) == (USAGE, "", 1), error
    assert re.search(message, error), error


@pytest.mark.parametrize("environment", [{}, ASCII], ids=["utf-8", "ascii"])
def test_arguments_may_be_bytes(environment):
    code, out, error = run([*PLAIN, "generate", b"caf\xe9"], **environment)
    assert (code, out, error.count("\n")) == (USAGE, b"", 1), error
    assert "prompt='caf\\udce9' is no valid Unicode" in error


INPUTS = {
    "no UTF-8": (b"caf\xe9 noir", ("utf-8", "strict"), "has byte 0xe9 at 3, which is no utf-8"),
    "escaped": (b"caf\xe9 noir", ("ascii", "surrogateescape"), "is no valid Unicode: character 3"),
    "no ASCII": ("né".encode(), ("ascii", "strict"), "has byte 0xc3 at 1, which is no"),
    "blank": (b"  \n", ("utf-8", "strict"), "prompt is empty"),
    "closed": (None, (), "standard input, which is closed"),
}


@pytest.mark.parametrize(("given", "encoding", "message"), INPUTS.values(), ids=INPUTS)
def test_standard_input_that_is_no_text_is_one_line(monkeypatch, capfd, given, encoding, message):
    stream = None if given is None else io.TextIOWrapper(io.BytesIO(given), *encoding)
    monkeypatch.setattr("sys.stdin", stream)
    with pytest.raises(SystemExit) as exit:
        main(["generate", "-"])
    out, error = capfd.readouterr()
    assert (exit.value.code, out, error.count("\n")) == (USAGE, "", 1), error
    assert message in error


@pytest.mark.slow
@pytest.mark.parametrize(("given", "environment", "message"), [
    (b"caf\xe9 noir", {"PYTHONIOENCODING": "utf-8:strict"}, INPUTS["no UTF-8"][2]),
    (b"caf\xe9 noir", ASCII, INPUTS["escaped"][2]),
    ("né".encode(), {"PYTHONIOENCODING": "ascii:strict"}, INPUTS["no ASCII"][2]),
])  # fmt: skip
def test_standard_input_in_the_encoding_of_the_environment(given, environment, message):
    code, out, error = run([*PLAIN, "generate", "-"], given, **environment)
    assert (code, out, error.count("\n")) == (USAGE, b"", 1), error
    assert message in error


def test_standard_input_that_the_shell_closed_is_one_line():
    code, out, error = run(["sh", "-c", f"{sys.executable} -m engine generate - <&-"])
    assert (code, out, error.count("\n")) == (USAGE, b"", 1), error
    assert "standard input, which is closed" in error


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_an_output_that_lacks_characters_gets_them_escaped(monkeypatch, capsys, encoding):
    whole = "naïve 日本\N{REPLACEMENT CHARACTER}"
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stream)
    out = Output()
    out.write("plain", end="")
    out.close()
    assert capsys.readouterr().err == ""
    out.write(whole)
    out.close()
    assert stream.buffer.getvalue() == b"plain" + (whole + "\n").encode(encoding, "backslashreplace")
    assert capsys.readouterr().err == f"escaped what {encoding} lacks: set PYTHONIOENCODING=utf-8 to see it\n"


ANSWER = ["generate", "the end", "--raw", "--max-new-tokens", "60"]
BENCH = ["bench", "--model", "random:tiny-qwen2", "--workload", "mixed-2", "--policies", "sequential"]


@pytest.fixture
def in_ascii(monkeypatch, capsys):
    """`in_ascii(args)` runs a command, whose output must be ASCII, and gives it and the errors."""

    def call(*args: str) -> tuple[str, str]:
        stream = io.TextIOWrapper(io.BytesIO(), "ascii")
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as exit:
            main(args)
        error = capsys.readouterr().err
        assert not exit.value.code, error
        return stream.buffer.getvalue().decode("ascii"), error

    return call


def test_an_answer_of_any_characters_comes_out_in_ascii(in_ascii, tiny, monkeypatch):
    loaded = dataclasses.replace(tiny().loaded, tokenizer=byte_level(257))
    monkeypatch.setattr("engine.engine.load", lambda *_, **__: loaded)
    out, error = in_ascii(*ANSWER)
    assert "\\ufffd" in out
    assert "escaped what ascii lacks" in error


@pytest.mark.parametrize("command", [["models"], BENCH], ids=["models", "bench"])
def test_tables_are_drawn_in_any_encoding(in_ascii, monkeypatch, command):
    sizes = ("bytes_32bit", "bytes_16bit", "kv_bytes_per_token_32bit", "kv_bytes_per_token_16bit")
    row = {"spec": "made up", "architecture": "Made", **dict.fromkeys((*sizes, "parameters", "positions"), 8)}
    monkeypatch.setattr("engine.models.catalogue", lambda: [row])
    out, error = in_ascii(*command)
    assert "---" in out
    assert "escaped" not in error
    assert max(map(len, out.splitlines())) <= 100


COLUMN_SETS = [
    Column("name", ["sequential", "dynamic"], is_text=True),
    Column("TTFT\nP50", ["1.20", "22.35"], unit="s", rank=3),
    Column("rate", ["1.5", "1,200.5"], rank=1),
    Column("same\ntokens", ["24/24", "3/24"], rank=2),
]


@pytest.mark.parametrize(("width", "whole", "lines"), [
    ("40", False, [
        "             TTFT             same", "name        P50 s     rate  tokens", "─" * 34,
        "sequential   1.20      1.5   24/24", "dynamic     22.35  1,200.5    3/24", "below",
    ]),
    ("33", False, [
        "                       same", "name           rate  tokens", "─" * 27, "sequential      1.5   24/24",
        "dynamic     1,200.5    3/24", "no room for TTFT P50: widen it", "below",
    ]),
    ("19", False, [
        "name           rate", "─" * 19, "sequential      1.5", "dynamic     1,200.5", "no room for TTFT",
        "P50, same tokens:", "widen it", "below",
    ]),
    ("4", False, ["name", "─" * 10, "sequential", "dynamic"]),
    ("4", True, [
        "             TTFT             same", "name        P50 s     rate  tokens", "─" * 34,
        "sequential   1.20      1.5   24/24", "dynamic     22.35  1,200.5    3/24",
    ]),
])  # fmt: skip
def test_a_table_has_the_columns_that_there_is_room_for(monkeypatch, capsys, width, whole, lines):
    monkeypatch.setenv("COLUMNS", width)
    Output().show(COLUMN_SETS, "a title longer than any table", ["below"], "widen it", whole)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "a title longer than any table"
    assert shown[1 : 1 + len(lines)] == lines


def test_what_is_no_terminal_has_100_columns(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    columns = [Column("c", ["x" * 20], rank=rank) for rank in range(6)]
    Output().show(columns, "", [], "")
    assert max(map(len, capsys.readouterr().out.splitlines())) == 4 * 20 + 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "written"), [([*MODEL, *ANSWER], b"\\ufffd"), ([*PLAIN, *BENCH], b"---")]
)
def test_a_process_writes_in_the_encoding_of_its_environment(command, written):
    code, out, _ = run(command, **ASCII, PYTHONIOENCODING="ascii")
    assert (code, out.isascii()) == (0, True)
    assert written in out


ENDLESS = [*MODEL, "generate", "the end", "--raw", "--max-new-tokens", "4000"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(ENDLESS, marks=pytest.mark.slow),
        pytest.param([*PLAIN, "models"], marks=pytest.mark.slow),
        [*PLAIN, "--version"],
    ],
    ids=["generate", "models", "root"],
)
def test_an_output_that_nobody_reads_ends_the_program(command):
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None
    if command is ENDLESS:
        process.stdout.read(20)
    process.stdout.close()  # as `head` does
    process.stdout = None
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == NO_READER, error
    assert error.replace("LOADED\n", "") == ""


@pytest.mark.parametrize("when", [pytest.param("loading", marks=pytest.mark.slow), "streaming"])
def test_ctrl_c_is_one_line(when):
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    command = ENDLESS
    if when == "loading":
        command = [
            *MODEL[:2],
            SPOKEN.replace("    return", "    import time; time.sleep(60)\n    return"),
            *ENDLESS[3:],
        ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline() == b"LOADED\n"
    if when == "streaming":
        process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1].decode()
    assert (process.returncode, error) == (INTERRUPTED, "interrupted\n")
