"""Rates of the machine: a fixed product and a fixed copy, the one ceiling of the whole project.

Measured before and after each benchmark, so that a slow machine is not taken for slow code; the roofline
columns are percentages of these rates. They change when the machine does, never when the engine does: no
model and no engine may enter.

The data are random. Of ones, a GPU computes a product at clocks that no real weights allow it; and memory
that was only ever zeroed is one page, whose copy reads nothing. Of the repeats the fastest counts: a ceiling
is the rate that the machine can reach, and whatever disturbs a repeat makes it slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = {"cpu": 4, "cuda": 20}  # a GPU needs some of them to raise its clocks
BLOCK = 1 << 20  # random bytes, of which the copied memory is made


@dataclass(frozen=True)
class MachineSpeed:
    """Rates a device reached: `matmul_gflops` in the given dtype, `copy_gbps` counting bytes read plus
    written."""

    matmul_gflops: float
    copy_gbps: float

    def drift_pct(self, after: MachineSpeed) -> float:
        """Return how far `after` is from this, in percent, by whichever moved more; below 0 is slower."""
        moved = (after.matmul_gflops / self.matmul_gflops, after.copy_gbps / self.copy_gbps)
        return 100.0 * (max(moved, key=lambda ratio: abs(ratio - 1.0)) - 1.0)


def measure(device: str, dtype: str, size: int | None = None, copy_bytes: int | None = None) -> MachineSpeed:
    """Measure both rates, each by its fastest repeat.

    Args:
        device, dtype: as torch names them. On a CPU the product is [2 size, size] x [size, size], by
            whichever of BLAS and oneDNN is faster (they can differ by more than two); on CUDA it is `size`
            cubed.
        size, copy_bytes: default to work of about a tenth of a second on the CPU and less on a GPU.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    size = size or (8192 if kind == "cuda" else 768)
    copy_bytes = copy_bytes or (1 << 30 if kind == "cuda" else 1 << 26)
    rows = size if kind == "cuda" else 2 * size
    left, right, source = _data(device, getattr(torch, dtype), rows, size, copy_bytes)
    target = torch.ones_like(source)
    flop, moved = 2.0 * rows * size * size, 2.0 * copy_bytes
    products: list[Callable[[], object]] = [lambda: left @ right]
    if kind == "cpu" and torch.backends.mkldnn.is_available() and left.dtype == torch.float32:
        blocked, weight = left.to_mkldnn(), right.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(blocked, weight))
    with torch.inference_mode():
        seconds = min(_best(product, device, REPEATS[kind]) for product in products)
        copy_s = _best(lambda: target.copy_(source), device, REPEATS[kind])
    return MachineSpeed(flop / seconds / 1e9, moved / copy_s / 1e9)


def _data(
    device: str, dtype: torch.dtype, rows: int, size: int, copy_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return factors [rows, size] and [size, size] and bytes to copy, random and every time the same."""
    random = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(count, size, generator=random, device=device).to(dtype) for count in (rows, size)
    )
    block = torch.randint(256, (min(BLOCK, copy_bytes),), dtype=torch.uint8, generator=random, device=device)
    return left, right, block.repeat(-(-copy_bytes // BLOCK))[:copy_bytes]


def _best(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the seconds of the fastest repeat, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        sync(device)
        started = time.perf_counter()
        work()
        sync(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def sync(device: str) -> None:
    """Wait until the device has done all it was given; nothing to do on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
