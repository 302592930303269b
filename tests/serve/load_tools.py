"""How load tools are asked for a load, and what their reports say of it: a command line and a reader each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perf.importers import Tool, readers

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VLLM_BENCH = (  # the command `vllm` of the package for CPUs does not start: it looks for the other's version
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What a tool is to send: `streams` at a time, or where that is None, `rate` a second on average."""

    path: str
    streams: int | None
    rate: float
    requests: int
    prompt_tokens: int = 64
    output_tokens: int = 32

    @property
    def is_chat(self) -> bool:
        return self.path == CHAT


@dataclass(frozen=True, slots=True)
class Target:
    """Whom it asks. tokenizer: a folder that has the model's. folder: where it may write."""

    url: str
    model: str
    tokenizer: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Report:
    """What a tool says of a load."""

    requests: int
    output_tokens: int
    ttft_mean_ms: float
    ttft_p50_ms: float


@dataclass(frozen=True, slots=True)
class LoadTool:
    """A tool. command: its program, in the environment's folder `bin`, and the arguments. environment: what
    its process has besides ours: one worker, for it shares the processors with the server."""

    command: Callable[[Load, Target], list[str]]
    read: Callable[[Path], Report]
    environment: Mapping[str, str] = field(default_factory=dict)


def imported(tool: Tool, path: Path) -> Report:
    """Read a report by the reader that `perf import` has for it."""
    ((_, found),) = readers.read(tool, path)
    assert found.identity.requests is not None
    tokens, mean = found.shown["output_tokens"], found.shown["ttft_mean_ms"]
    p50 = found.sample["ttft_p50_ms"]
    assert isinstance(tokens, int)
    assert isinstance(mean, float)
    assert isinstance(p50, float)
    return Report(found.identity.requests, tokens, mean, p50)


def guidellm(load: Load, target: Target) -> list[str]:
    kind = f"poisson,rate={load.rate:g}" if load.streams is None else f"concurrent,streams={load.streams}"
    backend = f"kind=openai_http,target={target.url},model={target.model},request_format={load.path}"
    data = f"prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"
    return [
        "guidellm", "run", "--backend", backend, "--profile", f"kind={kind}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}",
        "--data", f"kind=synthetic_text,{data}", "--disable-progress",
        "--output", f"kind=json,path={target.folder / 'guidellm.json'}",
    ]  # fmt: skip


def aiperf(load: Load, target: Target) -> list[str]:
    rate = ["--request-rate", f"{load.rate:g}"]
    return [
        "aiperf", "profile", "--model", target.model, "--tokenizer", str(target.tokenizer),
        "--url", target.url, "--endpoint-type", "chat" if load.is_chat else "completions", "--streaming",
        *(rate if load.streams is None else ["--concurrency", f"{load.streams}"]),
        "--request-count", f"{load.requests}", "--synthetic-input-tokens-mean", f"{load.prompt_tokens}",
        "--output-tokens-mean", f"{load.output_tokens}", "--extra-inputs", "ignore_eos:true",
        "--use-server-token-count", "--random-seed", "7", "--workers-max", "1", "--record-processors", "1",
        "--output-artifact-dir", str(target.folder), "--ui", "none",
    ]  # fmt: skip


def vllm_bench(load: Load, target: Target) -> list[str]:
    rate = ["--request-rate", f"{load.rate:g}"]
    return [
        "python", "-c", VLLM_BENCH, "--backend", "openai-chat" if load.is_chat else "openai",
        "--endpoint", load.path, "--base-url", target.url, "--model", target.model,
        "--tokenizer", str(target.tokenizer), "--dataset-name", "random", "--seed", "1",
        "--random-input-len", f"{load.prompt_tokens}", "--random-output-len", f"{load.output_tokens}",
        "--num-prompts", f"{load.requests}", "--ignore-eos", "--temperature", "0",
        *(rate if load.streams is None else ["--max-concurrency", f"{load.streams}"]),
        "--save-result", "--save-detailed", "--result-dir", str(target.folder),
        "--result-filename", "vllm.json",
    ]  # fmt: skip


def inference_perf(load: Load, target: Target) -> list[str]:
    """Its only chats that need no hub are those of a ShareGPT file, and they ask for 30 tokens each."""
    length = {"type": "fixed", "total_count": load.requests}
    data: dict[str, object] = {
        "type": "random",
        "input_distribution": length | dict.fromkeys(("min", "max", "mean"), load.prompt_tokens),
        "output_distribution": length | dict.fromkeys(("min", "max", "mean"), load.output_tokens),
    }
    if load.is_chat:
        data = {"type": "shareGPT", "path": str(_conversations(load, target.folder))}
    stage: dict[str, float] = {"rate": load.rate, "duration": round(load.requests / load.rate)}
    if load.streams is not None:
        stage = {"num_requests": load.requests, "concurrency_level": load.streams}
    kind = "poisson" if load.streams is None else "concurrent"
    config = {
        "api": {"type": "chat" if load.is_chat else "completion", "streaming": True},
        "data": data,
        "load": {"type": kind, "stages": [stage], "num_workers": 1},
        "server": {"type": "vllm", "model_name": target.model, "base_url": target.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(target.tokenizer)},
        "report": {"request_lifecycle": {"use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": str(target.folder)}},
    }
    file = target.folder / "inference-perf.yml"
    file.write_text(json.dumps(config))  # YAML reads it
    return ["inference-perf", "-c", str(file)]


def _conversations(load: Load, folder: Path) -> Path:
    """Write a question and an answer for each request: the tool sends both."""
    file = folder / "conversations.json"
    words = ["river", "stone", "lamp", "green", "seven", "market", "quiet", "paper"]
    lines = []
    for number in range(load.requests):
        asked = " ".join(words[(number + at) % len(words)] for at in range(load.prompt_tokens - 8))
        turns = [{"from": "human", "value": f"{number} {asked}?"}, {"from": "gpt", "value": "So it is."}]
        lines.append(json.dumps({"conversations": turns}))
    file.write_text("\n".join(lines) + "\n")
    return file


def read_inference_perf(folder: Path) -> Report:
    summary = json.loads((folder / "summary_lifecycle_metrics.json").read_text(encoding="utf-8"))
    good = summary["successes"]
    ttft = good["latency"]["time_to_first_token"]
    assert summary["failures"]["count"] == 0, summary["failures"]
    tokens = int(good["output_tokens"]["total"])  # the server's; those of `output_len` are the client's
    return Report(good["count"], tokens, ttft["mean"] * 1e3, ttft["median"] * 1e3)


TOOLS = {
    "guidellm": LoadTool(
        guidellm,
        lambda folder: imported(Tool.GUIDELLM, folder / "guidellm.json"),
        {"GUIDELLM__MAX_WORKER_PROCESSES": "1"},
    ),
    "aiperf": LoadTool(aiperf, lambda folder: imported(Tool.AIPERF, folder / "profile_export_aiperf.json")),
    "vllm-bench": LoadTool(vllm_bench, lambda folder: imported(Tool.VLLM_BENCH, folder / "vllm.json")),
    "inference-perf": LoadTool(inference_perf, read_inference_perf),
}
