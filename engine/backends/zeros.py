"""Memory for weights, keys and values: zeros that take none before they are written, in huge pages."""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the kind of `like`, which on a CPU take no memory before they are written."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    # numpy's zeros, unlike torch's, take no memory before they are written; nor does fresh memory, of which
    # Linux gives huge pages if told to: attention reads all over it.
    count = math.prod(shape) * like.dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(shape)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)
