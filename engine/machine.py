"""The machine that runs this: its processor and devices, and where what was made for it once is kept."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
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


def limit_threads() -> None:
    """Let torch, and whoever asks it, use no more threads than there are processors for this process.

    Threads wait for each other spinning: one too many takes the time of all.
    """
    import torch

    most = processors()
    if torch.get_num_threads() > most:
        LOG.warning("torch uses %d threads; this process may use %d processors, so %d from now on",
                    torch.get_num_threads(), most, most)  # fmt: skip
        torch.set_num_threads(most)


def placement(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and dtype to load a model on and in: these, or what "auto" means and int8 needs.

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
    if dtype in ("auto", "int8"):
        dtype = "float16" if device.startswith("cuda") else "float32"
    return device, dtype
