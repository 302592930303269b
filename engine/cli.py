"""`python -m engine bench | generate | models`: arguments, progress and one-line errors; torch is imported on
use."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import __version__
from engine.config import POLICIES, EngineConfig
from engine.errors import InputError, check_text, shown
from engine.output import INTERRUPTED, Output, ending, fail
from engine.progress import Progress
from engine.request import SamplingParams

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
PLOTS = (".png", ".svg", ".pdf")

Model = Annotated[
    str, typer.Option(help="A hub id, a folder, a .gguf file, 'smollm2' or 'random:NAME'; see models.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, float16, bfloat16, float64 or int8 (packed on a CPU).")
]
Seed = Annotated[int, typer.Option(help="Seeds the workload, random weights and sampling.")]


@app.callback(invoke_without_command=True)
@ending()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Dynamic batching for unmodified Hugging Face Transformers causal language models.

    Exit codes: 0 done, 1 a fault of this program, 2 what you can mend (one line says how), 130 interrupted,
    141 nobody read the output.
    """
    if version:
        Output().write(__version__)
        raise typer.Exit


@app.command()
@ending()
def bench(
    model: Model = "smollm2",
    policies: Annotated[str, typer.Option(help="Comma-separated; also: generate.")] = ",".join(POLICIES),
    batch_sizes: Annotated[
        str, typer.Option(help="Comma-separated, for the policies that batch.")
    ] = "1,4,16",
    workload: Annotated[
        str, typer.Option(help="N requests: chat-N, paper-N, mixed-N or shared-prefix-N.")
    ] = "chat-32",
    arrivals: Annotated[
        str, typer.Option(help="When they are due: all, poisson:RATE or burst:SIZE:GAP_S.")
    ] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, interleaved; the median one is shown.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write a row a request here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput and latency here (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Run one workload through several ways of batching it and compare them in one table.

    'sequential' is the batch=1 baseline, whose tokens the others' are compared with; 'generate' is
    Transformers' own. Workloads: chat is English, paper 128 tokens in and 256 out, mixed log-normal. Ctrl-C
    shows what has finished.
    """
    from engine import bench as bench_module, report
    from engine.engine import Engine
    from engine.workload import make

    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        problem = "must be whole numbers, comma-separated: 1,4,16"
        raise InputError(f"batch-sizes={shown(batch_sizes)} {problem}") from None
    pairs = bench_module.ways([policy.strip() for policy in policies.split(",")], sizes)
    for option, path in (("csv", csv), ("json", json), ("plot", plot)):
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise InputError(
                f"{option}={str(path)!r} cannot be written: name a file in a folder that is there"
            )
    if plot and plot.suffix not in PLOTS:
        raise InputError(f"plot={str(plot)!r} must end in one of {', '.join(PLOTS)}")
    if plot and find_spec("matplotlib") is None:
        raise InputError("plot needs matplotlib: pip install 'dynamic-batch[plot]'")
    # bad names and numbers, before a model is loaded
    make(workload, vocab_size=2, seed=seed, arrivals=arrivals)
    if dtype == "int8" and "generate" in dict(pairs):
        raise InputError("policies has 'generate', which is Transformers' own: leave it out of dtype='int8'")
    config = EngineConfig(device=device, dtype=dtype, seed=seed, generation_config="none")
    # The policy that joins no weights: this engine is just asked.
    engine = Engine.from_pretrained(model, replace(config, policy="sequential"), progress=True)
    limits = {"vocab_size": engine.vocab_size, "max_positions": engine.max_positions}
    work = make(workload, tokenizer=engine.tokenizer, seed=seed, arrivals=arrivals, **limits)
    runs: list[bench_module.Run] = []
    with Progress(f"{workload} on {model}", len(pairs) * rounds, unit="runs") as bar:
        try:
            for run in bench_module.bench(engine.loaded, work, pairs, config, rounds):
                runs.append(run)
                bar.advance()
        except KeyboardInterrupt:
            bar.write("interrupted: showing the runs that finished")
    if not runs:
        raise typer.Exit(INTERRUPTED)
    environment = {
        "workload": workload,
        "arrivals": arrivals,
        "seed": seed,
        **bench_module.environment(engine.loaded),
    }
    environment["dtype"] = engine.config.dtype
    title = f"{workload}, arrivals {arrivals}, on {model} ({environment['dtype']}, {environment['device']})"
    summary = report.summarise(runs)
    out = Output()
    out.show(report.table(summary, title), width=180)
    held = {"weights": environment["weight_bytes"], "their packed copies": summary["copied_bytes"].max()}
    held |= {"KV": summary["kv_bytes_peak"].max(), "peak RSS": environment["peak_rss_bytes"]}
    held |= {"peak CUDA": environment["peak_cuda_bytes"]}
    out.write("memory in MiB: " + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in held.items()))
    unused = summary[summary["policy"] != "generate"].groupby("policy", sort=False)["kv_unused_mean"].mean()
    if len(unused):
        waste = ", ".join(f"{policy} {positions:,.1f}" for policy, positions in unused.items())
        out.write(f"KV positions that a request held without need, on average: {waste}")
    if model.startswith("random:"):
        out.write("weights are random: speed does not depend on their values, text would be noise")
    if csv:
        report.requests_frame(runs).to_csv(csv, index=False)
    if json:
        report.write_json(json, runs, environment)
    if plot:
        report.write_plot(plot, summary, title)
    out.close()
    if len(runs) < len(pairs) * rounds:
        raise typer.Exit(INTERRUPTED)


@app.command()
@ending()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; '-' reads standard input.")],
    model: Model = "smollm2",
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of output at most (256).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token (0).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many tokens; 0: all (0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the fewest of this share (1).")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop those below this share of the best (0).")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less (1).")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the output at this text; may be repeated.")
    ] = None,
    generation_config: Annotated[
        str, typer.Option(help="auto: what isn't given is as the model says, else as in (); none: as in ().")
    ] = "auto",
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Stream a model's answer to a prompt, through its chat template where it has one."""
    params = SamplingParams(
        max_new_tokens,
        0,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    text = check_text("prompt", _standard_input() if prompt == "-" else prompt)
    if not text.strip():
        raise InputError("prompt is empty: give at least one word")
    config = EngineConfig(device=device, dtype=dtype, seed=seed, generation_config=generation_config)
    from engine.engine import Engine

    engine, out = Engine.from_pretrained(model, config, progress=True), Output()
    if params.max_new_tokens is None and "max_new_tokens" not in engine.defaults:
        params = replace(params, max_new_tokens=256)
    chat = not raw and engine.tokenizer is not None and engine.tokenizer.chat_template
    for chunk in engine.stream(engine.chat(text) if chat else text, params):
        out.write(chunk.text, end="")
    out.write("")
    out.close()
    assert chunk.output is not None
    if chunk.output.error:
        raise InputError(f"{model} failed: {chunk.output.error}")
    m = chunk.output.metrics
    rate = f", {1e3 / m.tpot_ms:.1f} tok/s" if m.tpot_ms else ""
    tokens = f"{m.prompt_tokens} tokens in, {m.output_tokens} out ({m.finish_reason})"
    typer.echo(f"{tokens}, TTFT {m.ttft_ms:.0f} ms{rate}", err=True)


def _standard_input() -> str:
    """All text on standard input."""
    if sys.stdin is None:
        raise InputError("prompt='-' reads standard input, which is closed: give the text itself")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        problem = f"has byte {error.object[error.start]:#x} at {error.start}, which is no {error.encoding}"
        raise InputError(f"prompt='-' reads standard input, which {problem}: give it text") from None


@app.command()
@ending()
def models() -> None:
    """List the named models: parameters, bytes of weights, bytes of keys and values a token."""
    from rich.table import Table

    from engine.models import catalogue

    out = Table(caption="also: a hub id (org/name), a local folder, or a .gguf file", caption_justify="left")
    for heading in (
        "spec",
        "architecture",
        "parameters",
        "32-bit",
        "16-bit",
        "KV/token 32-bit",
        "16-bit",
        "positions",
    ):
        out.add_column(heading, justify="left" if heading in ("spec", "architecture") else "right")
    for row in catalogue():
        sizes = (row["bytes_32bit"], row["bytes_16bit"])
        kv = (row["kv_bytes_per_token_32bit"], row["kv_bytes_per_token_16bit"])
        cells = [row["spec"], row["architecture"], f"{row['parameters']:,}"]
        cells += [f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e3:,.0f} kB" for size in sizes]
        out.add_row(*cells, *(f"{size:,} B" for size in kv), f"{row['positions']:,}")
    Output().show(out, width=140)


def main(args: Any = None) -> None:
    """Run the command line; what the user can mend ends in one line on standard error and exit code 2."""
    try:
        app(args)
    except (InputError, OSError) as error:
        fail(error)
