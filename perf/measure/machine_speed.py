"""The canary: a fixed product and a fixed copy. They change when the machine changes, never when the engine
does.

Run before and after each benchmark, so that a slow machine is not taken for slow code; their rates are also
the measured limits that roofline columns are percentages of. No model and no engine may enter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 4


@dataclass(frozen=True)
class Canary:
    """Rates a device reached: `matmul_gflops` in the given dtype, `copy_gbps` counting bytes read plus
    written."""

    matmul_gflops: float
    copy_gbps: float

    def drift_pct(self, after: Canary) -> float:
        """How far `after` is from this, in percent, by whichever of the two moved more; below 0 is slower."""
        moved = (after.matmul_gflops / self.matmul_gflops, after.copy_gbps / self.copy_gbps)
        return 100.0 * (max(moved, key=lambda ratio: abs(ratio - 1.0)) - 1.0)


def measure(device: str, dtype: str, size: int | None = None, copy_bytes: int | None = None) -> Canary:
    """The best of a few repeats (what the machine can do, not what it happened to do).

    Args:
        device, dtype: as torch names them. On a CPU the product is [2 size, size] x [size, size], by
            whichever of BLAS and oneDNN is faster (they can differ by more than two); on CUDA it is `size`
            cubed.
        size, copy_bytes: default to work of about a tenth of a second on the CPU and less on a GPU.
    """
    cuda = device.startswith("cuda")
    size = size or (8192 if cuda else 768)
    copy_bytes = copy_bytes or (1 << 30 if cuda else 1 << 26)
    kind: torch.dtype = getattr(torch, dtype)
    rows = size if cuda else 2 * size
    left = torch.ones(rows, size, dtype=kind, device=device)
    right = torch.ones(size, size, dtype=kind, device=device)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    flop, moved = 2.0 * rows * size * size, 2.0 * copy_bytes
    products: list[Callable[[], object]] = [lambda: left @ right]
    if not cuda and torch.backends.mkldnn.is_available() and kind == torch.float32:
        blocked, weight = left.to_mkldnn(), right.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(blocked, weight))
    with torch.inference_mode():
        seconds = min(_best(product, device) for product in products)
        return Canary(flop / seconds / 1e9, moved / _best(lambda: target.copy_(source), device) / 1e9)


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest repeat, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
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
