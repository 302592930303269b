"""llama.cpp's own HTTP server, run by the Python that has `xllamacpp`: the process that `perf serve-peer
llama-cpp` becomes.

Started by its path inside that environment, so it imports the standard library and xllamacpp, and nothing of
this package.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="llama-cpp", description="llama.cpp's HTTP server on 127.0.0.1.")
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument("--alias", required=True, help="the model's id in the API")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of a step")
    parser.add_argument("--slots", type=int, required=True, help="requests at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of a request, prompt and output")
    parser.add_argument("--cache-type", choices=("F32", "F16", "BF16"), required=True, help="of the KV cache")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="more",
                        help="any field of CommonParams, as cpuparams.poll=0")  # fmt: skip
    return parser.parse_args()


def settings(server: Any, wanted: argparse.Namespace) -> Any:
    """Return llama.cpp's parameters for a measurement.

    A slot for each request of a batch; no prompt cache, in the slots or beside them; no line a request.
    """
    params = server.CommonParams()
    params.model.path = wanted.model
    params.model_alias = {wanted.alias}
    params.port = wanted.port
    params.offline = True
    params.n_parallel = wanted.slots
    params.n_ctx = wanted.slots * wanted.context
    params.fit_params = False  # sizes are as they were asked for
    params.cache_type_k = params.cache_type_v = getattr(server.ggml_type, f"GGML_TYPE_{wanted.cache_type}")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted.threads
    # A connection that is open, idle or streaming, holds a thread: with too few, requests wait unseen.
    params.n_threads_http = 4 * wanted.slots + 16
    params.cache_prompt = params.cache_idle_slots = False
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    params.slot_prompt_similarity = 0.0
    params.endpoint_metrics = True
    params.ui = False
    params.verbosity = 1  # errors
    for order in wanted.more:
        change(params, order)
    return params


def change(params: Any, order: str) -> None:
    """Set one field, `NAME=VALUE`, to a value of the type that it has; end the program for one it has not."""
    name, _, value = order.partition("=")
    *path, last = name.split(".")
    try:
        for part in path:
            params = getattr(params, part)
        kind = type(getattr(params, last))
        if kind is bool:
            setattr(params, last, {"true": True, "false": False}[value])
        elif kind in (int, float, str):
            setattr(params, last, kind(value))
        else:
            raise ValueError(kind)
    except (AttributeError, KeyError, ValueError):
        wanted = "NAME must be a number, a text or a truth value of CommonParams, VALUE one of its kind"
        raise SystemExit(f"--set {order}: {wanted} (true, false)") from None


def main() -> None:
    """Serve until a signal ends the process: SIGTERM and Ctrl-C at once, whatever is under way."""
    wanted = arguments()
    import xllamacpp

    running = xllamacpp.Server(settings(xllamacpp, wanted))  # returns when the model is loaded
    for number in (signal.SIGTERM, signal.SIGINT):  # its own handlers end its loop, and leave this process
        signal.signal(number, signal.SIG_DFL)
    print(f"llama.cpp listens on {running.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
