"""`python -m engine bench | generate | serve | batch | models`: arguments and one-line errors.

Torch is imported on use.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import __version__
from engine.config import POLICIES, EngineConfig
from engine.errors import InputError, check_text
from engine.output import INTERRUPTED, Column, Output, ending, fail
from engine.progress import Progress
from engine.request import SamplingParams

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
IMPORTING = "Importing PyTorch and Transformers"

Model = Annotated[
    str, typer.Option(help="A hub id, a folder, a .gguf file, 'smollm2' or 'random:NAME'; see models.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, float16, bfloat16, float64 or int8 (packed on a CPU).")
]
ServedName = Annotated[str | None, typer.Option(help="What requests call the model (its spec).")]
MaxBatchSize = Annotated[int, typer.Option(min=1, help="Requests that run together at most.")]
Unstated = Annotated[
    str, typer.Option(help="auto: what a request leaves open is as the model says; none: it is not.")
]
KvMemory = Annotated[
    str, typer.Option(help="For keys and values: bytes, or a fraction of the memory that is free.")
]
Ray = Annotated[bool, typer.Option("--ray", help="On a Ray cluster: $RAY_ADDRESS, else this machine.")]
Replicas = Annotated[int, typer.Option(min=1, help="Engines, with --ray.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each, or a share of one, with --ray.")]
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
    ] = "1,8,16",
    workload: Annotated[
        str,
        typer.Option(
            help="N requests: brief-N, chat-N, mixed-N, nano-N, paper-N, shared-prefix-N; or a file."
        ),
    ] = "brief-24",
    arrivals: Annotated[
        str, typer.Option(help="all, poisson:RATE, burst:SIZE:GAP_S or trace (a file's); auto: trace or all.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, interleaved; the median one is shown.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write a row a request here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw throughput and latency here (.png, .svg, .pdf).")
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="Show every column, however wide the terminal is.")
    ] = False,
) -> None:
    """Run one workload by several policies at several batch sizes and compare them in one table.

    'sequential' is the batch=1 baseline, whose tokens the others' are compared with; 'generate' is
    Transformers' own. Workloads have N requests: chat is English with 8-64 tokens out, brief the
    same with 8-24, paper 128 tokens in and 256 out, mixed log-normal, nano 100-1024 in and out; files
    are rows of our own, ShareGPT's or a Mooncake trace (engine/README.md). Ctrl-C shows what has
    finished.
    """
    from engine.bench.options import BenchOptions

    asked = model, policies, batch_sizes, workload, arrivals, rounds, device, dtype, seed
    options = BenchOptions(*asked, csv, json, plot, wide)
    with Progress(IMPORTING):
        from engine.bench import command
    if not command.run(options):
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
        max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), seed=seed,
    )  # fmt: skip
    text = check_text("prompt", _standard_input() if prompt == "-" else prompt)
    if not text.strip():
        raise InputError("prompt is empty: give at least one word")
    config = EngineConfig(device=device, dtype=dtype, seed=seed, generation_config=generation_config)
    with Progress(IMPORTING):
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


@app.command()
@ending()
def serve(
    model: Model = "smollm2",
    host: Annotated[str, typer.Option(help="Another than this machine's own needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that requests must have; else $ENGINE_API_KEY.")
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Let whoever reaches another host's port use it.")
    ] = False,
    served_model_name: ServedName = None,
    max_batch_size: MaxBatchSize = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beyond those.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a whole answer.")] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for what is on its way, once told to end.")
    ] = 30.0,
    generation_config: Unstated = "auto",
    kv_memory: KvMemory = "0.6",
    prefix_caching: Annotated[bool, typer.Option(help="Share what prompts begin with alike.")] = True,
    ray: Ray = False,
    replicas: Replicas = 1,
    gpus: Gpus = 0.0,
    cpus: Annotated[
        float | None,
        typer.Option(min=0, help="CPUs of each, with --ray ($RAY_ADDRESS: 1; here: a share of all)."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Serve a model by OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    SIGTERM or Ctrl-C takes nothing new, and lets what is on its way end. With --ray several engines
    share the requests; limits are of each.
    """
    _check_ray(ray, replicas=replicas, gpus=gpus, cpus=cpus)
    config = EngineConfig(
        max_batch_size=max_batch_size,
        generation_config=generation_config,
        kv_memory=_bytes_or_share(kv_memory),
        prefix_caching=prefix_caching,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    with Progress(IMPORTING):
        serving = _extra("engine.serve.command", "serve")
        spread = _extra("engine.cluster.serve", "ray") if ray else None
    asked = model, config, host, port, api_key_file, without_key, served_model_name
    options = serving.ServeOptions(*asked, max_queue, request_timeout, drain_timeout)
    if spread is None:
        serving.run(options)
    else:
        spread.run(options, spread.Cluster(replicas, gpus, cpus))


@app.command()
@ending()
def batch(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="JSON lines, as OpenAI's Batch API takes them.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Its answers; those that are there stand.")],
    model: Model = "smollm2",
    served_model_name: ServedName = None,
    max_batch_size: MaxBatchSize = 32,
    generation_config: Unstated = "auto",
    kv_memory: KvMemory = "0.6",
    ray: Ray = False,
    replicas: Replicas = 1,
    gpus: Gpus = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Answer a file of requests. A run that was killed goes on where it was, if it is given again."""
    _check_ray(ray, replicas=replicas, gpus=gpus)
    config = EngineConfig(
        max_batch_size=max_batch_size,
        generation_config=generation_config,
        kv_memory=_bytes_or_share(kv_memory),
        device=device,
        dtype=dtype,
        seed=seed,
    )
    for path in (source, target.parent):
        if not path.exists():
            raise InputError(f"{str(path)!r} is not there")
    name = served_model_name or model
    with Progress(IMPORTING):
        from engine import batch as work
        from engine.engine import Engine

        spread = _extra("engine.cluster.batch", "ray") if ray else None
    if spread is None:
        found = work.run(Engine.from_pretrained(model, config), name, source, target)
    else:
        found = spread.run(source, target, model, config, name, spread.Cluster(replicas, gpus))
    before = f", {found.before:,} of them before" if found.before else ""
    failed = f", {found.failed:,} refused or failed" if found.failed else ""
    now = f"{found.answered:,} answered{failed}" if found.rows > found.before else "nothing was left to do"
    typer.echo(f"{found.rows:,} requests{before}: {now}", err=True)


def _bytes_or_share(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise InputError(f"kv_memory={text!r} must be bytes, or a fraction such as 0.6") from None


def _check_ray(ray: bool, **options: float | None) -> None:
    """Raise InputError for an option of Ray's that would have no effect."""
    usual = {"replicas": 1, "gpus": 0.0, "cpus": None}
    for name, value in options.items():
        if not ray and value != usual[name]:
            raise InputError(f"{name}={value:g} is for a Ray cluster: give --ray too")


def _extra(module: str, name: str) -> Any:
    """Return a module that needs an extra. Raises InputError where that is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("engine"):
            raise
        problem = f"this needs {error.name}, which is not installed"
        raise InputError(f"{problem}: pip install 'dynamic-batch[{name}]'") from None


def _standard_input() -> str:
    problem = "which is closed"
    try:
        if sys.stdin is not None:
            return sys.stdin.read()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        problem = f"which has byte {byte:#x} at {error.start}, which is no {error.encoding}"
    raise InputError(f"prompt='-' reads standard input, {problem}: give the text itself")


@app.command()
@ending()
def models() -> None:
    """List the named models: parameters, bytes of weights, bytes of keys and values a token."""
    from engine.models import catalogue

    rows = catalogue()

    def size(n: int) -> str:
        return f"{n / 1e9:.2f} GB" if n > 1e8 else f"{n / 1e3:,.0f} kB"

    columns = [
        Column("spec", [row["spec"] for row in rows], is_text=True),
        Column("architecture", [row["architecture"] for row in rows], rank=2, is_text=True),
        Column("parameters", [f"{row['parameters']:,}" for row in rows], rank=1),
        Column("weights\n32-bit", [size(row["bytes_32bit"]) for row in rows], rank=6),
        Column("weights\n16-bit", [size(row["bytes_16bit"]) for row in rows], rank=4),
        Column("KV/token\n32-bit", [f"{row['kv_bytes_per_token_32bit']:,} B" for row in rows], rank=7),
        Column("KV/token\n16-bit", [f"{row['kv_bytes_per_token_16bit']:,} B" for row in rows], rank=5),
        Column("positions", [f"{row['positions']:,}" for row in rows], rank=3),
    ]
    below = ["also: a hub id (org/name), a local folder, or a .gguf file"]
    Output().show(columns, "", below, "a wider terminal, or COLUMNS=120, shows every column")


def main(args: Any = None) -> None:
    """Run the command line; what the user can mend ends in one line on standard error and exit code 2."""
    try:
        app(args)
    except (InputError, OSError) as error:
        fail(error)
