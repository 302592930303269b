"""Files that the tools themselves wrote (tests/perf/data/imported/README.md has the commands), as they are
and with their times multiplied."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perf.importers import Tool

DATA = Path(__file__).parent / "data" / "imported"
# of each tool two runs of one load, with the record of each request where the tool has one
RUNS = {
    Tool.GUIDELLM: ("run-1.json", "run-2.json"),
    Tool.AIPERF: ("run-1/profile_export_aiperf.json", "run-2/profile_export_aiperf.json"),
    Tool.VLLM_BENCH: ("detailed-1.json", "detailed-2.json"),
    Tool.SGLANG: ("detailed-1.jsonl", "detailed-2.jsonl"),
    Tool.GENAI: ("run-1/profile_export_genai_perf.json", "run-2/profile_export_genai_perf.json"),
}
BESIDE = {Tool.AIPERF: "profile_export.jsonl", Tool.GENAI: "profile_export.json"}  # the records
Edit = Callable[[Any], object]


def copied(tool: Tool, name: str, folder: Path, edit: Edit | None = None, beside: Edit | None = None) -> Path:
    """A tool's file in a folder of its own, with the file of records that belongs to it; `edit` changes what
    is in it, `beside` each of the records."""
    home = folder / f"{len(list(folder.glob('*'))) if folder.is_dir() else 0:03d}"
    home.mkdir(parents=True)
    path = home / Path(name).name
    _write(path, _text(DATA / tool / name), edit)
    source = (DATA / tool / name).parent
    if tool in BESIDE and (source / BESIDE[tool]).is_file():
        _write(home / BESIDE[tool], _text(source / BESIDE[tool]), beside)
    return path


def first(tool: Tool, folder: Path, edit: Edit | None = None, beside: Edit | None = None) -> Path:
    """A copy of a tool's first run."""
    return copied(tool, RUNS[tool][0], folder / "files", edit, beside)


def content(tool: Tool, name: str) -> Any:
    """What a tool's file has in it, of several lines the first."""
    return _values(_text(DATA / tool / name))[0]


def slowed(tool: Tool, name: str, folder: Path, factor: float) -> Path:
    """A copy of a tool's file, with all the times multiplied that are taken from it."""
    edits: dict[Tool, tuple[Edit, Edit | None]] = {
        Tool.GUIDELLM: (lambda data: [_slow_guidellm(one, factor) for one in data["benchmarks"]], None),
        Tool.AIPERF: (lambda data: _slow_summary(data, factor), lambda data: _slow_record(data, factor)),
        Tool.VLLM_BENCH: (lambda data: _slow_lists(data, factor), None),
        Tool.SGLANG: (lambda data: _slow_lists(data, factor), None),
        Tool.GENAI: (lambda data: _slow_summary(data, factor), lambda data: _slow_stream(data, factor)),
    }
    return copied(tool, name, folder, *edits[tool])


def _text(path: Path) -> str:
    packed = path.with_name(f"{path.name}.gz")
    return (
        gzip.decompress(packed.read_bytes()).decode()
        if packed.is_file()
        else path.read_text(encoding="utf-8")
    )


def _values(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def _write(path: Path, text: str, edit: Edit | None) -> None:
    values = _values(text)
    if edit is not None:
        for value in values:
            edit(value)
        text = "\n".join(map(json.dumps, values))
    path.write_text(text, encoding="utf-8")


def _slow_guidellm(one: dict[str, Any], factor: float) -> None:
    one["duration"] *= factor
    for record in one["requests"]["successful"]:
        for key in ("time_to_first_token_ms", "request_latency", "inter_token_latency_ms"):
            record[key] *= factor


def _slow_lists(data: dict[str, Any], factor: float) -> None:
    data["duration"] *= factor
    data["ttfts"] = [factor * ttft for ttft in data["ttfts"]]
    data["itls"] = [[factor * gap for gap in gaps] for gaps in data["itls"]]


def _slow_summary(data: dict[str, Any], factor: float) -> None:
    for metric in ("time_to_first_token", "inter_token_latency", "request_latency"):
        data[metric] |= {
            key: factor * value for key, value in data[metric].items() if key not in ("unit", "count")
        }
    data["output_token_throughput"]["avg"] /= factor


def _slow_record(data: dict[str, Any], factor: float) -> None:
    metrics = data["metrics"]
    for metric in ("time_to_first_token", "inter_token_latency", "request_latency"):
        metrics[metric]["value"] *= factor
    gaps = metrics["inter_chunk_latency"]
    gaps["value"] = [factor * gap for gap in gaps["value"]]


def _slow_stream(data: dict[str, Any], factor: float) -> None:
    for request in data["experiments"][0]["requests"]:
        sent = request["timestamp"]
        request["response_timestamps"] = [
            sent + round(factor * (at - sent)) for at in request["response_timestamps"]
        ]
