"""`python -m engine bench | generate | models`: arguments, progress and one-line errors; torch is imported on use."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engine import __version__
from engine.config import EngineConfig
from engine.errors import InputError
from engine.request import SamplingParams

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
ERRORS = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option(help="A hub id, a local folder, a .gguf file, 'smollm2', or 'random:NAME'; see the models command."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16, bfloat16 or float64.")]
Seed = Annotated[int, typer.Option(help="Seeds the workload, random weights and sampling.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Dynamic batching for unmodified Hugging Face Transformers causal language models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def bench(
    model: Model = "smollm2",
    policies: Annotated[
        str, typer.Option(help="Of sequential, dynamic, and generate (Transformers one by one); comma-separated.")
    ] = "sequential,dynamic",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes of the batching policies, comma-separated.")] = "1,4,16",
    workload: Annotated[
        str, typer.Option(help="chat-N (English), paper-N (128 in, 256 out), mixed-N, or shared-prefix-N; N requests.")
    ] = "chat-32",
    arrivals: Annotated[
        str, typer.Option(help="When requests are due: all, poisson:RATE (a second) or burst:SIZE:GAP_SECONDS.")
    ] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, interleaved; the median one is shown.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write a row a request here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput and latency here (.png, .svg, .pdf).")] = None,
) -> None:
    """Run one workload through several ways of batching it and compare them in one table.

    'sequential' is the batch=1 baseline. Tokens are compared between the ways. Ctrl-C shows what has finished.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from engine import bench as bench_module, report
    from engine.engine import resolve
    from engine.models import load
    from engine.workload import make

    pairs = bench_module.ways(_words(policies), _numbers("batch-sizes", batch_sizes))
    for path in (csv, json, plot):
        _check_writable(path)
    if plot:
        _need("matplotlib", "plot")
    config = EngineConfig(device=device, dtype=dtype, seed=seed)
    loaded = load(model, **dict(zip(("device", "dtype"), resolve(config), strict=True)), seed=seed, progress=True)
    work = make(
        workload,
        vocab_size=loaded.model.config.get_text_config(decoder=True).vocab_size,
        tokenizer=loaded.tokenizer,
        seed=seed,
        arrivals=arrivals,
        max_positions=loaded.model.config.get_text_config(decoder=True).max_position_embeddings,
    )
    runs: list[bench_module.Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=ERRORS, transient=True) as bar:
        task = bar.add_task(f"{workload} on {model}", total=len(pairs) * rounds)
        try:
            for run in bench_module.bench(loaded, work, pairs, config, rounds):
                runs.append(run)
                bar.advance(task)
        except KeyboardInterrupt:
            ERRORS.print("interrupted: showing the runs that finished")
    if not runs:
        raise typer.Exit(130)
    environment = bench_module.environment(loaded)
    title = f"{workload}, arrivals {arrivals}, on {model} ({environment['dtype']}, {environment['device']})"
    summary = report.summarise(runs)
    Console(width=None if sys.stdout.isatty() else 180).print(report.table(summary, title))
    mib = {name: environment[f"{name}_bytes"] >> 20 for name in ("weight", "peak_rss", "peak_cuda")}
    kv = max(run.metrics.counters.kv_bytes_peak for run in runs) >> 20
    typer.echo(
        f"memory in MiB: weights {mib['weight']}, KV {kv}, peak RSS {mib['peak_rss']}, peak CUDA {mib['peak_cuda']}"
    )
    if model.startswith("random:"):
        typer.echo("weights are random: speed does not depend on their values, text would be noise")
    if csv:
        report.requests_frame(runs).to_csv(csv, index=False)
    if json:
        report.write_json(json, runs, environment)
    if plot:
        report.write_plot(plot, summary, title)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; '-' reads standard input.")],
    model: Model = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of output at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the fewest tokens of this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the most likely.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the output at this text; may be repeated.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Stream a model's answer to a prompt, through its chat template where it has one."""
    params = SamplingParams(
        max_new_tokens, 0, temperature, top_k, top_p, min_p, repetition_penalty, stop=tuple(stop or ()), seed=seed
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("prompt is empty: give at least one word")
    from engine.engine import Engine

    engine = Engine.from_pretrained(model, EngineConfig(device=device, dtype=dtype, seed=seed), progress=True)
    chat = not raw and engine.tokenizer is not None and engine.tokenizer.chat_template
    metrics = None
    for chunk in engine.stream(engine.chat(text) if chat else text, params):
        typer.echo(chunk.text, nl=False)
        metrics = chunk.output.metrics if chunk.output else None
    typer.echo()
    if metrics is not None and metrics.ttft_ms is not None:
        rate = f", {1e3 / metrics.tpot_ms:.1f} tok/s" if metrics.tpot_ms else ""
        ERRORS.print(
            f"[dim]{metrics.prompt_tokens} tokens in, {metrics.output_tokens} out ({metrics.finish_reason}), "
            f"TTFT {metrics.ttft_ms:.0f} ms{rate}[/dim]"
        )


@app.command()
def models() -> None:
    """List the named models: parameters, bytes of weights, bytes of keys and values a token."""
    from rich.table import Table

    from engine.models import catalogue

    out = Table(caption="also: a hub id (org/name), a local folder, or a .gguf file", caption_justify="left")
    for heading in ("spec", "architecture", "parameters", "32-bit", "16-bit", "KV/token 32-bit", "16-bit", "positions"):
        out.add_column(heading, justify="left" if heading in ("spec", "architecture") else "right")
    for row in catalogue():
        sizes = (row["bytes_32bit"], row["bytes_16bit"])
        kv = (row["kv_bytes_per_token_32bit"], row["kv_bytes_per_token_16bit"])
        out.add_row(
            row["spec"],
            row["architecture"],
            f"{row['parameters']:,}",
            *(f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e3:,.0f} kB" for size in sizes),
            *(f"{size:,} B" for size in kv),
            f"{row['positions']:,}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(out)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise InputError(f"{name}={text!r} must be whole numbers, comma-separated, such as 1,4,16") from None


def _check_writable(path: Path | None) -> None:
    if path and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: the folder {path.absolute().parent} does not exist: make it first")


def _need(module: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise InputError(f"--{extra} needs {module}: pip install 'dynamic-batch[{extra}]'")


def main(args: Any = None) -> None:
    """Run the command line; what the user can mend ends in one line on standard error and exit code 2."""
    try:
        app(args)
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        message = f"{error.filename}: {error.strerror}"
    else:
        return
    ERRORS.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)
