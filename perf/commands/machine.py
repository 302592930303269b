"""`perf counters | accuracy | check-gpu | setup-peer`: this machine, and what runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from engine import InputError
from perf import console

app = typer.Typer()


@app.command()
def counters(
    record: Annotated[bool, Option("--record", help="Take the counters as they are now for right.")] = False,
) -> None:
    """Compare exact counters with the committed ones: the gate that needs no quiet machine."""
    from perf.measure.counters import main as run

    raise typer.Exit(run(record))


@app.command()
def accuracy(
    text: Annotated[Path, Argument(help="A text file; its beginning is read.")],
    model: Annotated[str, Option(help="A model with a tokenizer.")] = "smollm2",
    tokens: Annotated[int, Option(min=2, help="Of the text, at most.")] = 2048,
) -> None:
    """Show what int8 does to a model on a text: perplexity beside float32's, and how often the top token
    agrees."""
    from engine import load as load_model
    from perf.measure.accuracy import accuracy as measure

    loaded = load_model(model, progress=True)
    if loaded.tokenizer is None:
        raise InputError(f"model={model!r} has no tokenizer: name one that has")
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")).input_ids[:tokens]
    for name, value in measure(loaded, ids).items():
        typer.echo(f"{name:20} {value:,.4f}" if isinstance(value, float) else f"{name:20} {value:,}")


@app.command(name="check-gpu")
def check_gpu(
    out: Annotated[Path, typer.Option(help="The folder for logs, the saved run and a trace.")] = Path(
        "gpu-check"
    ),
    test_seconds: Annotated[float, typer.Option(min=1, help="Budget of the tests.")] = 275,
    benchmark_seconds: Annotated[float, typer.Option(min=1, help="Budget of the benchmarks.")] = 275,
) -> None:
    """Run the GPU tests of this checkout and then its benchmarks with --quick, within ten minutes.

    Ends with the exit code of the tests or, where they pass, of the benchmarks: 124 if one was cut off.
    """
    from perf.gpu_check import check_gpu as run
    from perf.report.terminal import show

    def say(what: Any) -> None:
        show(what, console.WIDTH)

    try:
        code = run(out, test_seconds=test_seconds, benchmark_seconds=benchmark_seconds, say=say)
    except KeyboardInterrupt:
        code = console.INTERRUPTED
    raise typer.Exit(code)


@app.command(name="setup-peer")
def setup_peer(name: Annotated[str, Argument(help="Which peer; see perf/servers/environments.py.")]) -> None:
    """Make the virtual environment of a peer, a backend or a server whose dependencies clash with ours."""
    from perf.servers.environments import setup_peer as make

    typer.echo(f"{name} is ready in {make(name)}")
