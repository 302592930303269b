"""The ways to multiply by a weight on a CPU, and which is fastest on this machine for how many rows.

float32 `F.linear` is up to three times slower than the machine can be at the row counts of decoding. What is
better differs between CPUs (oneDNN's packed weights, or the weight on the left), so it is measured once a
machine and shape, on the model's own weights, and kept in the cache folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

from engine.machine import cache_dir, cpu_name

# (x [T, M], bias [N] or None) -> [T, N]
Way = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# measured; what lies between counts as the next, and what is beyond as the last
ROWS = (1, 4, 16, 32, 64, 128, 512)
MOST = 4e9  # multiply-adds of one product worth measuring: beyond, every way is near the machine's peak
TOY = 2**18  # bytes of a weight whose measurement would take longer than whatever it saves
COLD = 64e6  # bytes of weights to go through, so that they come from memory as they do in a model
# multiply-adds to time at once, where this is reached with fewer weights: then caches matter no more
ENOUGH = 4e8
FEW = 4  # rows that oneDNN multiplies faster than fewer
LONG = 0.04  # seconds of rounds for a number of rows, two at least
HOPELESS = 1.5  # a way that takes so many times the fastest's time in the first round is out


def plain(weight_NM: torch.Tensor) -> Way:
    """torch's own."""
    return lambda x_TM, bias_N: F.linear(x_TM, weight_NM, bias_N)


def left(weight_NM: torch.Tensor) -> Way:
    """The weight on the left: few rows are then few columns, which MKL takes better."""

    def multiply(x_TM: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        rows = len(x_TM)
        if rows == 1:
            x_TM = x_TM.repeat(2, 1)  # a product with two columns is three times as fast as with one
        out_TN = (weight_NM @ x_TM.t()).t()[:rows].contiguous()
        return out_TN if bias_N is None else out_TN.add_(bias_N)

    return multiply


def packed(weight_NM: torch.Tensor) -> Way:
    """oneDNN on a copy of the weight in the order in which its kernels read it."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight_NM, 32)

    def multiply(x_TM: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        rows = len(x_TM)
        if rows < FEW:
            x_TM = F.pad(x_TM, (0, 0, 0, FEW - rows))
        return torch.ops.mkldnn._linear_pointwise(x_TM, copy, bias_N, "none", [], "")[:rows]

    return multiply


WAYS: dict[str, Callable[[torch.Tensor], Way]] = {"packed": packed, "plain": plain, "left": left}
COPIES = {"packed"}  # hold the weight again


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can take this weight packed."""
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )


def choose(weights: Sequence[Callable[[], torch.Tensor]]) -> list[tuple[int, str]]:
    """The fastest ways for weights of one shape [N, M]: (up to so many rows, name of the way), rising.

    Measured the first time on a machine, in a second or so; afterwards read from the cache folder. The
    weights are made when they are needed.
    """
    first = weights[0]()
    if not can_pack(first):
        return [(ROWS[-1], "plain")]
    if first.nbytes < TOY:
        return [(ROWS[-1], "packed")]
    file = cache_dir() / "linear.json"
    threads, isa = f"{torch.get_num_threads()} threads", os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    shape = "x".join(map(str, first.shape))
    key = " | ".join((cpu_name(), threads, torch.__version__, isa, ", ".join(WAYS), shape))
    fastest = _read(file).get(key)
    if fastest is None:
        made = [weight() for weight in weights[: max(1, int(COLD // first.nbytes))]]
        every = {name: [make(weight) for weight in made] for name, make in WAYS.items()}
        fastest = fastest_ways(every, first.numel(), first.shape[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({**_read(file), key: fastest}, indent=1))
            fresh.replace(file)
    return list(zip(ROWS, fastest, strict=False))


def fastest_ways(every: Mapping[str, Sequence[Way]], size: int, width: int) -> list[str]:
    """The name of the fastest way for each of ROWS, as far as it is worth measuring: best of a few rounds.

    Args:
        every: of each way by its name, several of the same size, with weights of their own.
        size: multiply-adds of one of them, a row.
        width: of a row.
    """
    names: list[str] = []
    for rows in ROWS:
        if names and rows * size > MOST:
            break
        x = torch.full((rows, width), 0.5)
        best = dict.fromkeys(every, float("inf"))
        rounds, until = 0, time.perf_counter() + LONG
        while rounds < 2 or time.perf_counter() < until:
            rounds, limit = rounds + 1, HOPELESS * min(best.values())
            for name in [name for name, seconds in best.items() if seconds <= limit]:
                started = time.perf_counter()
                for way in every[name][: 1 + int(ENOUGH / rows / size)]:
                    way(x, None)
                best[name] = min(best[name], time.perf_counter() - started)
        names.append(min(best, key=lambda name: best[name]))
    return names


def _read(file: Path) -> dict[str, list[str]]:
    """What is kept; nothing if there is no file, or not one of ours."""
    try:
        kept = json.loads(file.read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}
