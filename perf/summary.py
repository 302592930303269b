"""Tables for the end of a pytest session: what was just measured, side by side. The reports are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Info = dict[str, Any]
Cell = Callable[[Info], str]


def tables(recorded: Sequence[Info]) -> Iterator[tuple[str, list[str]]]:
    """A title and lines for each group that is worth a table of its own."""
    peers = [info for info in recorded if info["group"] == "peers"]
    for device in sorted({info["device"] for info in peers}):
        rows = [info for info in peers if info["device"] == device]
        first = rows[0]
        title = (
            f"peers: {first['workload']} on {first['model']}, {first['dtype']}, {device}, batch {first['batch_size']}"
        )
        yield title, lines(rows, PEERS)


def number(key: str, form: str) -> Cell:
    """A cell that shows one value, or "-" where there is none."""
    return lambda info: "-" if info.get(key) is None else form.format(info[key])


PEERS: dict[str, Cell] = {
    "backend": lambda info: str(info["backend"]),
    "tokens/s": number("tokens_per_s", "{:,.1f}"),
    "x engine": number("ratio_to_engine", "{:.3f}"),
    "TTFT P95 ms": number("ttft_p95_ms", "{:,.0f}"),
    "TPOT P50 ms": number("tpot_p50_ms", "{:,.1f}"),
    "latency P95 ms": number("latency_p95_ms", "{:,.0f}"),
    "FLOPs %": number("useful_flops_pct", "{:.1f}"),
    "same tokens": lambda info: f"{info['same_tokens']}/{info['checked_requests']}",
    "near ties": number("near_ties", "{}"),
    "rounds": lambda info: str(len(info["rounds"]["tokens_per_s"])),
}


def lines(rows: Sequence[Info], columns: dict[str, Cell]) -> list[str]:
    """A table as text: the first column to the left, the others to the right."""
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    return [
        "  ".join(text.ljust(width) if at == 0 else text.rjust(width)
                  for at, (text, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]  # fmt: skip
