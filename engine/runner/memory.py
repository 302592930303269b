"""How much of a machine's memory may hold keys and values, and whether an error says that there was too
little."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from engine import cgroup
from engine.config import EngineConfig
from engine.errors import InputError


def kv_memory(model: PreTrainedModel, config: EngineConfig, tokens: int) -> int:
    """Bytes for keys and values: of what is free beside a step of so many tokens, which is measured by
    running one.

    Raises:
        InputError: if more is asked for than there is.
    """
    free, rows = free_bytes(model.device), config.max_batch_size
    # by itself, and of the graphs
    taken = 2 * step_bytes(model, tokens, rows) + step_bytes(model, rows, rows)
    if not isinstance(config.kv_memory, int):
        return int(config.kv_memory * max(0, free - taken))
    if config.kv_memory > free - taken:
        raise InputError(
            f"kv_memory={config.kv_memory} is too large: {free} bytes are free, and a step "
            f"of {tokens} tokens takes {taken} of them: lower kv_memory, max_step_tokens or max_batch_size"
        )
    return config.kv_memory


def free_bytes(device: torch.device, root: Path = cgroup.ROOT) -> int:
    """Memory free on the device now: on CUDA by the driver's account, and what torch keeps of what it freed.

    On a CPU what the system has, and no more than a container, or a limit of this process, leaves of it.

    Args:
        root: where the file tree begins that says what a container may take.
    """
    if device.type != "cuda":
        group = cgroup.memory_left(root)
        return min([psutil.virtual_memory().available, *_own_limits(), *([] if group is None else [group])])
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _own_limits() -> list[int]:
    """Bytes that this process may still take by each of its own limits (`ulimit -v`, `ulimit -d`) that is
    set."""
    if sys.platform == "win32":
        return []
    import resource

    used, left = psutil.Process().memory_info(), []
    for limit, size in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            left.append(max(0, most - size))
    return left


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most memory that this process held at once.

    The kernel's other account, `ru_maxrss`, starts with what the process held that started this one.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found is not None:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for a tensor or an array; torch's on a CPU raise a RuntimeError that says
    so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


@torch.inference_mode()
def step_bytes(model: PreTrainedModel, tokens: int, rows: int) -> int:
    """Device memory that a step of so many tokens, `rows` of them sampled, takes beside weights, keys and
    values.

    Measured by running the model, whose own layers take no less than fused ones; 0 on a CPU, which can swap.

    Raises:
        InputError: if it does not fit.
    """
    if model.device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    try:
        model(ids, use_cache=False, logits_to_keep=min(rows, tokens))
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"max_step_tokens={tokens}: a step does not fit the device's memory: lower it"
        ) from error
    peak = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    return peak
