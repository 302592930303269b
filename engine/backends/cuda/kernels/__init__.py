"""Triton kernels; each also runs on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def triton_kernels() -> Any:
    """What a device step calls, as Triton kernels; imported when needed, since a CPU can do without
    Triton."""
    from engine.backends.cuda.kernels import attention, norm_activation, rope_kv_write, split_k

    rooms = attention, norm_activation, rope_kv_write, split_k
    return SimpleNamespace(**{name: value for room in rooms for name, value in vars(room).items()})
