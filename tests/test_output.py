"""How commands end: bytes that are no text, an output that takes not all or no more, Ctrl-C; a line each."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from engine.output import INTERRUPTED, NO_READER, USAGE, Output

ROOT = str(Path(__file__).parents[1])
SPOKEN = """
import dataclasses, sys
import engine.engine
from engine import load
from engine.cli import main
from tests.test_text import byte_level

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


STRICT = {"PYTHONIOENCODING": "utf-8:strict"}
INPUTS = {
    "no UTF-8": (b"caf\xe9 noir", STRICT, "has byte 0xe9 at 3, which is no utf-8"),
    "escaped": (b"caf\xe9 noir", ASCII, "is no valid Unicode: character 3"),
    "no ASCII": ("né".encode(), {"PYTHONIOENCODING": "ascii:strict"}, "has byte 0xc3 at 1, which is no"),
    "blank": (b"  \n", {}, "prompt is empty"),
}


@pytest.mark.parametrize(("given", "environment", "message"), INPUTS.values(), ids=INPUTS)
def test_standard_input_that_is_no_text_is_one_line(given, environment, message):
    code, out, error = run([*PLAIN, "generate", "-"], given, **environment)
    assert (code, out, error.count("\n")) == (USAGE, b"", 1), error
    assert message in error


def test_standard_input_that_is_closed_is_one_line():
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


def test_an_answer_of_any_characters_comes_out_in_ascii():
    command = [*MODEL, "generate", "the end", "--raw", "--max-new-tokens", "60"]
    code, out, error = run(command, **ASCII, PYTHONIOENCODING="ascii")
    assert (code, out.isascii()) == (0, True)
    assert b"\\ufffd" in out
    assert "escaped what ascii lacks" in error


BENCH = ["bench", "--model", "random:tiny-qwen2", "--workload", "mixed-2", "--policies", "sequential"]


@pytest.mark.parametrize("command", [["models"], BENCH], ids=["models", "bench"])
def test_tables_are_drawn_in_any_encoding(command):
    code, out, error = run([*PLAIN, *command], **ASCII, PYTHONIOENCODING="ascii")
    assert (code, out.isascii()) == (0, True)
    assert b"---" in out
    assert "escaped" not in error


ENDLESS = [*MODEL, "generate", "the end", "--raw", "--max-new-tokens", "4000"]


@pytest.mark.parametrize(
    "command", [ENDLESS, [*PLAIN, "models"], [*PLAIN, "--version"]], ids=["generate", "models", "root"]
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


@pytest.mark.parametrize("when", ["loading", "streaming"])
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
