"""The machine that runs this: its processor and devices, and where what was made for it once is kept."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
from functools import cache
from pathlib import Path

from engine import cgroup
from engine.errors import InputError

LOG = logging.getLogger(__name__)
CPU_FIELDS = ("model name", "cpu family", "model", "stepping")


def cache_dir() -> Path:
    """Return $DYNAMIC_BATCH_CACHE, else $XDG_CACHE_HOME/dynamic-batch, else ~/.cache/dynamic-batch."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dynamic-batch")
    return Path(os.environ.get("DYNAMIC_BATCH_CACHE") or default).expanduser()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name, family, model and stepping, as clouds give many the same name.

    Where the kernel does not tell, Python's name for it.
    """
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = (re.search(rf"^{field}\s*: (.*)", text, re.MULTILINE) for field in CPU_FIELDS)
    return " ".join(match[1] for match in found if match) or platform.processor() or platform.machine()


def processors(root: Path = cgroup.ROOT) -> int:
    """Return how many processors this process may use: those it is bound to, at most what its quota fills.

    Args:
        root: where the file tree begins that says what a container may take.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, math.ceil(cgroup.processors(root) or bound)))


def memory_nodes(root: Path = cgroup.ROOT) -> int:
    """Return on how many nodes of memory (NUMA) the processors lie that this process is bound to.

    Args:
        root: where the file tree begins in which Linux says so; where it does not, there is one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 1
    bound = os.sched_getaffinity(0)
    lists = [path.read_text() for path in root.glob("sys/devices/system/node/node*/cpulist")]
    return max(1, sum(not bound.isdisjoint(_numbers(text)) for text in lists))


def _numbers(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8."""
    ends = ([int(end) for end in part.split("-")] for part in text.split(",") if part.strip())
    return {number for end in ends for number in range(end[0], end[-1] + 1)}


@cache
def _warn_of(nodes: int) -> None:
    LOG.warning("this process may run on %d nodes of memory, and a thread waits for memory of another's: "
                "bind it to one (numactl --cpunodebind=0 --membind=0), one process a node",
                nodes)  # fmt: skip


def limit_threads() -> None:
    """Let torch, and whoever asks it, use no more threads than there are processors for this process.

    Threads wait for each other spinning: one too many takes the time of all. Warn, once, where they may run
    on several nodes of memory.
    """
    import torch

    most, nodes = processors(), memory_nodes()
    if nodes > 1 and torch.get_num_threads() > 1:
        _warn_of(nodes)
    if torch.get_num_threads() > most:
        LOG.warning("torch uses %d threads; this process may use %d processors, so %d from now on",
                    torch.get_num_threads(), most, most)  # fmt: skip
        torch.set_num_threads(most)


def placement(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and dtype to load a model on and in: these, or what device="auto" means and int8
    needs.

    Raises:
        InputError: for a device that is not here, which is better learnt before a download than after it.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and dtype != "int8" else "cpu"
    try:
        torch.empty(0, device=device).tolist()  # a meta device has tensors, but nothing in them
    except Exception as error:  # whatever torch raises for a word that names no device
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"device={device!r} is not here ({reason}): give auto or cpu") from None
    return device, "float32" if dtype == "int8" else dtype


def auto_dtype(device: str, stored: str | None) -> str:
    """Return what dtype="auto" means on a kind of device for weights in a dtype, or in none that is stated.

    On a CPU, bfloat16 for weights in bfloat16, if the processor multiplies it (AVX512_BF16): nothing of them
    is lost, and compiled steps of every size are faster. Else float32, of which bfloat16 and float16 are a
    part.
    """
    if device == "cuda":
        return "float16"
    fast = device == "cpu" and stored == "bfloat16" and multiplies_bfloat16()
    return "bfloat16" if fast else "float32"


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor has an instruction for products of bfloat16, as far as Linux tells.

    (What is compiled goes by what Numba compiles for, and to ask that takes a moment and the whole backend.)
    """
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return re.search(r"^flags\s*:.*\bavx512_bf16\b", text, re.MULTILINE) is not None
