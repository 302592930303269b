"""Real load tools against the server: `python -m tests.serve.clients --tool guidellm --environment FOLDER`.

The folder is a virtual environment of the tool's own, for each brings packages that clash with ours. A server
is started (`python -m engine serve`) and the tool asks it for each load: `chat` and `completions`, so many
streams at a time, and `rate`, completions that come as a Poisson process. What the tool reports is then laid
beside what /metrics has counted meanwhile: requests, output tokens and the mean TTFT; and the median beside
that of the server's log, for a histogram has none. It ends with code 1 if a count differs, or a TTFT by more
than `--tolerance` ms.

What waits for a processor is late by the tool's clock, and in no server's metric. So the server computes with
a thread less than there are processors, and where times alone differ the load is tried again, `--attempts`
times at most; each has its line. Nothing but this machine is asked, and no hub.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine import smollm2_folder
from tests.serve.load_tools import CHAT, COMPLETIONS, TOOLS, Load, LoadTool, Report, Target
from tests.serve.running import Client

SERVE = (sys.executable, "-m", "engine", "serve")
READY_S, TOOL_S = 180.0, 600.0
COUNTED = {
    "requests": "vllm:request_success_total",
    "output_tokens": "vllm:generation_tokens_total",
    "first_tokens": "vllm:time_to_first_token_seconds_count",
    "ttft_s": "vllm:time_to_first_token_seconds_sum",
}
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
HEAD = "| tool | load | requests | output tokens | TTFT mean, ms | TTFT P50, ms | agree |"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started, and what it logs."""

    client: Client
    log: Path

    def counted(self) -> dict[str, float]:
        """Return what /metrics has counted so far, all labels together."""
        found = dict.fromkeys(COUNTED, 0.0)
        page = self.client.get("/metrics").body.decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                for name, theirs in COUNTED.items():
                    found[name] += sample.value if sample.name == theirs else 0
        return found

    def ttfts_ms(self) -> list[float]:
        """Return the TTFT of each request so far, as it was logged."""
        return [float(one) for one in re.findall(r" ttft_ms=([\d.]+)", self.log.read_text())]


def model_folder(spec: str, scratch: Path) -> Path:
    """Return a folder with a model's files: of `smollm2`, of a folder, or of `random:NAME` with a vocabulary
    as large as SmolLM2's and its tokenizer, for the tools count and make tokens."""
    if not spec.startswith("random:"):
        return smollm2_folder(print) if spec == "smollm2" else Path(spec)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.models.presets import PRESETS

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(print))
    config = PRESETS[spec.removeprefix("random:")].config()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    folder = scratch / spec.removeprefix("random:")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path, name: str, threads: int, log: Path) -> Iterator[Server]:
    """Start a server that computes with so many threads, and end it; it must then say 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(model), "--served-model-name", name, "--port", f"{port}"]
    environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
    with log.open("wb") as out, subprocess.Popen([*SERVE, *options], stderr=out, env=environment) as process:
        client = Client(port)
        try:
            until = time.monotonic() + READY_S
            while not _ready(client):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not get ready: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield Server(client, log)
        finally:
            process.terminate()
            code = process.wait(60)
    assert code == 0, log.read_text()[-2000:]


def _ready(client: Client) -> bool:
    try:
        return client.get("/health").status == 200
    except ConnectionError:
        return False


def run(tool: LoadTool, load: Load, target: Target, environment: Path) -> None:
    """Have the tool send a load; SystemExit with its last words if it fails."""
    program, *arguments = tool.command(load, target)
    out = target.folder / "output.txt"
    with out.open("wb") as told:
        done = subprocess.run(
            [str(environment / "bin" / program), *arguments], stdin=subprocess.DEVNULL, stdout=told,
            stderr=subprocess.STDOUT, timeout=TOOL_S, cwd=target.folder, env=_environment(tool),
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{program} ended with {done.returncode}: {out.read_text(errors='replace')[-3000:]}")


def _environment(tool: LoadTool) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**inherited, **QUIET, **tool.environment}


def compared(
    server: Server, tool: LoadTool, load: Load, target: Target, environment: Path
) -> tuple[Report, Report]:
    """Return what the tool reports of a load, and what the server counted meanwhile."""
    before, logged = server.counted(), len(server.ttfts_ms())
    run(tool, load, target, environment)
    counts = {name: value - before[name] for name, value in server.counted().items()}
    assert counts["first_tokens"] == counts["requests"], counts
    mean = 1e3 * counts["ttft_s"] / max(1, counts["first_tokens"])
    median = statistics.median(server.ttfts_ms()[logged:] or [0.0])
    ours = Report(int(counts["requests"]), int(counts["output_tokens"]), mean, median)
    return tool.read(target.folder), ours


def agree(theirs: Report, ours: Report, tolerance_ms: float) -> bool:
    """Return whether counts are equal and times near each other."""
    apart = (theirs.ttft_mean_ms - ours.ttft_mean_ms, theirs.ttft_p50_ms - ours.ttft_p50_ms)
    return same_counts(theirs, ours) and all(abs(one) <= tolerance_ms for one in apart)


def same_counts(theirs: Report, ours: Report) -> bool:
    """Return whether both have as many requests and tokens, and any."""
    counts = (ours.requests, ours.output_tokens)
    return (theirs.requests, theirs.output_tokens) == counts and all(counts)


def row(tool: str, words: str, theirs: Report, ours: Report, agreed: bool) -> str:
    """Return a line of the table: of each number the tool's, then the server's."""
    counts = [f"{theirs.requests} / {ours.requests}", f"{theirs.output_tokens} / {ours.output_tokens}"]
    mean = f"{theirs.ttft_mean_ms:.1f} / {ours.ttft_mean_ms:.1f}"
    median = f"{theirs.ttft_p50_ms:.1f} / {ours.ttft_p50_ms:.1f}"
    return f"| {' | '.join([tool, words, *counts, mean, median, 'yes' if agreed else 'NO'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tool", choices=list(TOOLS), required=True)
    parser.add_argument("--environment", type=Path, required=True, help="its virtual environment")
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or random:tiny-qwen2")
    parser.add_argument("--loads", default="chat,completions,rate")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="the server's")
    parser.add_argument("--tolerance", type=float, default=5.0, help="ms")
    options = parser.parse_args()
    loads = {
        "chat": Load(CHAT, options.streams, options.rate, options.requests),
        "completions": Load(COMPLETIONS, options.streams, options.rate, options.requests),
        "rate": Load(COMPLETIONS, None, options.rate, options.requests),
    }
    tool = TOOLS[options.tool]
    agreed: dict[str, bool] = {}  # by load
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        name = options.model.removeprefix("random:").rstrip("/").rpartition("/")[2]
        model = model_folder(options.model, scratch)
        print(HEAD, "|---|---|---:|---:|---:|---:|---|", sep="\n", flush=True)
        with serving(model, name, options.threads, scratch / "server.log") as server:
            url = f"http://127.0.0.1:{server.client.port}"
            for which, attempt in product(options.loads.split(","), range(options.attempts)):
                if agreed.get(which):
                    continue
                folder = scratch / f"{which}-{attempt}"
                folder.mkdir()
                target = Target(url, name, model, folder)
                theirs, ours = compared(server, tool, loads[which], target, options.environment.absolute())
                agreed[which] = agree(theirs, ours, options.tolerance)
                print(row(options.tool, f"{name}, {which}", theirs, ours, agreed[which]), flush=True)
                if not same_counts(theirs, ours):
                    sys.exit(1)
    sys.exit(not all(agreed.values()))


if __name__ == "__main__":
    main()
