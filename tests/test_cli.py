"""The command line as its users see it: help without torch, one line for what they can mend, tables."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from engine import __version__, models
from engine.cli import app, main
from engine.config import POLICIES
from engine.models import SPECS
from engine.runner.packed import PackedRunner
from engine.step import NON_FINITE, Done
from tests.test_detokenizer import byte_level

TINY = "random:tiny-qwen2"
BENCH = ["bench", "--model", TINY, "--workload", "mixed-6"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder, so that whatever it writes is seen, and tells no progress."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.progress.LINE_EVERY_S", math.inf)  # or a busy machine would add lines
    return tmp_path


@pytest.fixture
def run(capfd):
    """`run(args)` gives the exit code, what was printed, and the errors."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(args)
        return (exit.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def speaking(tiny, monkeypatch):
    """A tiny model with a tokenizer, which the commands load whatever they ask for."""
    loaded = replace(tiny().loaded, tokenizer=byte_level(257))
    monkeypatch.setattr("engine.engine.load", lambda *_, **__: loaded)
    return loaded


def strict(path: Path) -> dict:
    def refuse(word: str):
        raise ValueError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


LIGHT = [
    ["--help"], ["bench", "--help"], ["generate", "--help"], ["models", "--help"], ["--version"], [],
    ["generate", ""], ["generate", "hi", "--top-p", "2"], ["generate", "hi", "--dtype", "float8"],
    ["bench", "--rounds", "0"],
]  # fmt: skip
LIGHTLY = """
import sys
from engine.cli import main
for args in {commands}:
    try:
        main(args)
    except SystemExit:
        heavy = {{"numpy", "torch", "transformers", "pandas", "matplotlib"}} & sys.modules.keys()
        assert not heavy, (args, heavy)
for args in {checked}:
    try:
        main(args)
    except SystemExit as end:
        heavy = {{"torch", "transformers", "pandas", "matplotlib"}} & sys.modules.keys()
        assert end.code == 2 and not heavy, (args, heavy)
print("LIGHT")
"""


def test_what_needs_no_model_needs_no_torch_and_help_no_numpy():
    """All in one process: what one of them had imported would be there for the next."""
    checked = [args for args, _ in WRONG.values() if args[0] == "bench" and "--model" not in args]
    code = LIGHTLY.format(commands=LIGHT, checked=[*checked, [*BENCH, "--policies", "dynamic,nope"]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("LIGHT\n"), done.stdout + done.stderr
    assert all(command in done.stdout for command in ("bench", "generate", "models"))


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "engine", "--version"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (f"{__version__}\n", "")


def test_help_names_every_option_and_the_default_is_every_policy():
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    options = "model policies batch-sizes workload arrivals rounds device dtype seed csv json plot wide"
    assert all(f"--{option}" in result.stdout for option in options.split())
    assert all(default in result.stdout for default in (",".join(POLICIES), "brief-24", "1,8,16"))


def test_models_lists_every_spec(run):
    code, out, err = run("models")
    assert (code, err) == (0, "")
    assert [spec for spec in SPECS if not re.search(rf"^{spec} ", out, re.MULTILINE)] == []
    assert max(map(len, out.splitlines())) <= 100


WRONG = {
    "empty prompt": (["generate", ""], "prompt is empty"),
    "blank prompt": (["generate", " \n\t"], "prompt is empty"),
    "no tokens": (["generate", "hi", "--max-new-tokens", "0"], "max_new_tokens=0 must .* at least 1"),
    "fewer tokens": (["generate", "hi", "--max-new-tokens", "-5"], "max_new_tokens=-5 must .* at least 1"),
    "temperature": (["generate", "hi", "--temperature", "-0.5"], "temperature=-0.5 must .* at least 0"),
    "not a number": (["generate", "hi", "--temperature", "nan"], "temperature=nan must be a finite number"),
    "top_p": (["generate", "hi", "--top-p", "2"], "top_p=2.0 must .* to 1$"),
    "top_k": (["generate", "hi", "--top-k", "-1"], "top_k=-1 must .* at least 0"),
    "min_p": (["generate", "hi", "--min-p", "1.5"], "min_p=1.5 must .* to 1$"),
    "penalty": (["generate", "hi", "--repetition-penalty", "0"], "repetition_penalty=0.0 must"),
    "stop": (["generate", "hi", "--stop", ""], "stop=.* must be strings that are not empty"),
    "seed": (["generate", "hi", "--seed", "-1"], "seed=-1 must .* 0"),
    "dtype": (["generate", "hi", "--dtype", "float8"], "dtype='float8' must be one of auto, float64, "),
    "device": (["generate", "hi", "--device", "gpu"], r"device='gpu' is not here \(.*\): give auto or cpu"),
    "far device": (["generate", "hi", "--device", "cuda:99"],
     r"device='cuda:99' is not here \(.*\): give auto or cpu"),
    "model": (["generate", "hi", "--model", "smolm2"], "model 'smolm2' is no folder, .* near: .*smollm2"),
    "preset": (["bench", "--model", "random:nope"], "model 'random:nope' is no folder"),
    "file": (["generate", "hi", "--model", "./nope.gguf"], "model './nope.gguf' is no folder, .gguf file"),
    "no tokenizer": (["generate", "hi", "--model", TINY], f"{TINY} has no tokenizer"),
    "policy": ([*BENCH, "--policies", "dynamic,nope"],
     "policies has 'nope': choose from generate, sequential, "),
    "no policy": ([*BENCH, "--policies", ""], "policies has '': choose from"),
    "size 0": ([*BENCH, "--batch-sizes", "4,0"], "batch-sizes=0 must .* at least 1"),
    "size word": ([*BENCH, "--batch-sizes", "4,many"], "batch-sizes='4,many' must be whole numbers"),
    "no size": ([*BENCH, "--batch-sizes", ""], "batch-sizes='' must be whole numbers"),
    "nothing": ([*BENCH, "--policies", "dynamic", "--batch-sizes", "1"], "nothing to run: .* above 1"),
    "workload": (["bench", "--workload", "chats-32"], "workload='chats-32' must be one of chat-N, "),
    "workload file": (["bench", "--workload", "no/chats"], "workload='no/chats' can't be read: No such file"),
    "workload N": (["bench", "--workload", "chat-0"], "workload='chat-0' must .* N from 1 to "),
    "arrivals": (["bench", "--arrivals", "poisson:0"],
     "arrivals='poisson:0' must be all, poisson:RATE or burst:"),
    "defaults": (["generate", "hi", "--generation-config", "x"], "generation_config='x' must be one of auto"),
    "bench seed": (["bench", "--seed", "-1"], "seed=-1 must .* 0"),
    "int8 by another": ([*BENCH, "--dtype", "int8", "--policies", "generate"],
     "policies has 'generate', which is "),
    "bench dtype": ([*BENCH, "--dtype", "int4"], "dtype='int4' must be one of "),
    "bench device": ([*BENCH, "--device", "gpu"], "device='gpu' is not here"),
    "csv": ([*BENCH, "--csv", "no/folder.csv"],
     "csv='no/folder.csv' cannot be written: name a file in a folder"),
    "csv is a folder": ([*BENCH, "--csv", "."], "csv='.' cannot be written"),
    "json": ([*BENCH, "--csv", "fine.csv", "--json", "no/f.json"], "json='no/f.json' cannot be written"),
    "plot": ([*BENCH, "--json", "fine.json", "--plot", "no/f.png"], "plot='no/f.png' cannot be written"),
    "plot ending": ([*BENCH, "--plot", "plot.txt"], "plot='plot.txt' must end in one of .png, .svg, .pdf"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_line_before_any_work(run, elsewhere, monkeypatch, args, message):
    def work(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr("engine.engine.Engine.step", work)
    monkeypatch.setattr("engine.models.loader.smollm2_folder", work)
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert re.search(message, err.strip()), err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("args", [["bench", "--nope"], ["bench", "--rounds", "0"], ["bench", "--seed", "one"],
                                  ["generate"], ["batch"], ["nothing"]])  # fmt: skip
def test_usage_errors_are_typers(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err


def test_cuda_where_there_is_none(run, monkeypatch):
    def absent(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("torch.empty", absent)
    code, out, err = run(*BENCH, "--device", "cuda")
    assert (code, out) == (2, "")
    assert (
        err == "error: device='cuda' is not here (Torch not compiled with CUDA enabled): give auto or cpu\n"
    )


def test_an_unknown_hub_id_without_a_network(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run("generate", "hi", "--model", "nobody/nothing")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: model 'nobody/nothing' did not load: ")
    assert "other ways: a folder, a .gguf file, 'smollm2', 'random:NAME'" in err


def test_a_gguf_file_cut_short(run, elsewhere):
    pytest.importorskip("gguf")
    (elsewhere / "cut.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(7))
    code, out, err = run("generate", "hi", "--model", "cut.gguf")
    assert (code, out, err) == (2, "", "error: cut.gguf is cut short or not a GGUF file; fetch it again\n")


def test_a_disk_that_is_full_is_one_line_after_the_table(run, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "out.json")

    monkeypatch.setattr("engine.bench.report.write_json", full)
    code, out, err = run(*BENCH, "--policies", "sequential", "--json", "out.json")
    assert code == 2
    assert "sequential" in out
    assert err.strip() == "error: [Errno 28] No space left on device: 'out.json'"


def test_generate_streams_an_answer_and_says_on_stderr_what_it_took(run, smollm2, monkeypatch):
    monkeypatch.setattr("engine.engine.load", lambda *_, **__: smollm2)
    code, out, err = run("generate", "What is the capital of France?", "--max-new-tokens", "24")
    assert code == 0
    assert "Paris" in out
    assert "tokens in" not in out
    counts, ttft = err.strip().split(", TTFT ")
    assert re.fullmatch(r"\d+ tokens in, \d+ out \((stop|length)\)", counts), err
    assert ttft.endswith(" tok/s")


def test_generate_says_what_a_prompt_that_is_too_long_needs(run, speaking):
    code, out, err = run("generate", "word " * 900, "--raw")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "max_new_tokens=256 needs" in err
    assert f"{TINY} has 4096: shorten one of the two" in err


def test_generate_reads_standard_input_and_stops_at_a_stop_string(run, smollm2, monkeypatch):
    monkeypatch.setattr("engine.engine.load", lambda *_, **__: smollm2)
    monkeypatch.setattr("sys.stdin", io.StringIO("1, 2, 3, 4,"))
    code, out, err = run("generate", "-", "--raw", "--stop", "7", "--max-new-tokens", "30")
    assert (code, out.strip()) == (0, "5, 6,")
    assert "(stop)" in err


def test_a_request_that_gets_no_numbers_is_one_line(run, speaking, monkeypatch):
    def broken(self, step):
        result = launch(self, step)
        return Done(replace(result.collect(), choices=[NON_FINITE] * len(step)))

    launch = PackedRunner.launch
    monkeypatch.setattr(PackedRunner, "launch", broken)
    code, _, err = run("generate", "hi")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: smollm2 failed: the model gave logits that are NaN or infinite")


def test_generate_takes_what_is_not_given_from_the_models_generation_config(run, speaking, monkeypatch):
    stated = {"max_new_tokens": 3, "repetition_penalty": 1.5, "do_sample": True, "temperature": 5.0}
    asked = ["generate", "1, 2, 3, 1, 2, 3, 1,", "--raw"]
    _, greedy, err = run(*asked, "--max-new-tokens", "5")
    assert " 5 out " in err
    for name, value in stated.items():
        monkeypatch.setattr(speaking.model.generation_config, name, value)
    code, _, err = run(*asked)
    assert (code, " 3 out " in err) == (0, True), err
    assert run(*asked, "--seed", "1")[1] != run(*asked, "--seed", "2")[1]
    neutral = ["--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "5"]
    assert run(*asked, *neutral)[1] == greedy
    assert run(*asked, "--generation-config", "none", "--max-new-tokens", "5")[1] == greedy


def test_generate_says_when_the_model_gives_no_numbers(run, speaking, monkeypatch):
    forward = type(speaking.model).forward

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.full_like(output.logits, math.nan)
        return output

    monkeypatch.setattr(type(speaking.model), "forward", broken)
    code, _, err = run("generate", "hi")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: Qwen2ForCausalLM gives logits that are NaN or infinite")


def test_bench_prints_a_table_and_writes_the_files(run, elsewhere):
    matplotlib = pytest.importorskip("matplotlib.image")
    files = ["--csv", "out.csv", "--json", "out.json", "--plot", "out.png"]
    code, out, err = run(*BENCH, "--batch-sizes", "1,3", "--rounds", "2", "--dtype", "float64", *files)
    assert (code, err.strip()) == (0, "")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["out.csv", "out.json", "out.png"]
    ran = [(policy, 1 if policy == "sequential" else 3) for policy in POLICIES]
    for policy, size in ran:
        assert re.search(rf"^{policy} +{size} ", out, re.MULTILINE), out
    assert "weights are random" in out
    assert "memory in MiB: weights" in out

    rows = pd.read_csv("out.csv")
    assert len(rows) == 6 * 2 * len(ran)
    assert list(rows.groupby("run").size()) == [6] * 2 * len(ran)
    assert set(zip(rows.policy, rows.batch_size, strict=True)) == set(ran)
    assert (rows.ttft_ms > 0).all()
    assert (rows.latency_ms >= rows.ttft_ms).all()
    assert (rows.groupby("run").output_tokens.sum().nunique(), rows.finish_reason.unique()) == (1, ["length"])

    data = strict(elsewhere / "out.json")
    assert set(data) == {"environment", "summary", "requests"}
    asked = {"workload": "mixed-6", "arrivals": "all", "seed": 0, "model": TINY}
    assert asked.items() <= data["environment"].items()
    shown = [(row["policy"], row["batch_size"], row["rounds"]) for row in data["summary"]]
    assert shown == [(*pair, 2) for pair in ran]
    assert [row["same_tokens"] for row in data["summary"]] == [6] * len(ran)
    assert len(data["requests"]) == len(rows)
    assert matplotlib.imread("out.png").shape[2] == 4


def test_bench_needs_room_for_the_longest_request(run):
    code, out, err = run(
        "bench", "--model", TINY, "--workload", "paper-2", "--policies", "sequential", "--seed", "3"
    )
    assert (code, "paper-2" in out) == (0, True), err
    short = models.Preset("qwen2", (256, 64, 128, 1, 4, 2, 300), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.PRESETS, "tiny-qwen2", short)
        code, out, err = run("bench", "--model", TINY, "--workload", "paper-2")
    assert (code, out) == (2, "")
    assert err == "error: max_positions=300 is too small: the longest request of paper-2 needs 383\n"


def test_bench_in_int8_says_so_and_wide_shows_every_column(run):
    code, out, _ = run(*BENCH, "--dtype", "int8", "--batch-sizes", "3", "--json", "out.json", "--wide")
    assert code == 0
    assert "int8" in out.splitlines()[0]
    assert strict(Path("out.json"))["environment"]["dtype"] == "int8"
    words = " ".join(out.splitlines()[1:3]).split()
    counts = {"P50": 3, "P95": 3, "mean": 2, "padding": 1, "passes": 1, "%": 1}
    assert {word: words.count(word) for word in counts} == counts
    assert "no room for" not in out
