"""`attend_rows` compiled by TorchInductor, once for a machine and a model's shape, and kept in the cache folder.

Torch alone runs it as twenty operations that each go through memory; compiled, it is a few loops over the pages that
are read. Ahead of time, so that a later start loads it in milliseconds and calls carry no guards.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from engine.attention.rows import attend_rows
from engine.machine import cache_dir, cpu_name

LOG = logging.getLogger(__name__)


def compiled_rows(heads: int, kv_heads: int, size: int, head_dim: int) -> Callable[..., torch.Tensor]:
    """`attend_rows` for pages of `size` tokens and tensors only; torch's own where there is no C++ compiler.

    The first time on a machine this takes some seconds.
    """
    what = (
        inspect.getsource(attend_rows), inspect.getsource(_multiply), torch.__version__, cpu_name(),
        torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), heads, kv_heads, size, head_dim,
    )  # fmt: skip
    package = cache_dir() / f"rows-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.pt2"
    package.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{package}.lock"):
        if not package.exists() and not _build(package, heads, kv_heads, size, head_dim):
            return attend_rows
    run = torch._inductor.aoti_load_package(str(package)).loader.run
    # It takes every tensor to lie as its example did, and does not check: views must be laid out first.
    return lambda *tensors: run([tensor.contiguous() for tensor in tensors])[0]


def _build(package: Path, heads: int, kv_heads: int, size: int, head_dim: int) -> bool:
    """Compile to a file; False, and a warning, where that can't be done."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    rows, pages, longest = 3, 12, 4
    q_RHD, k_RKD, v_RKD = (torch.zeros(rows, count, head_dim) for count in (heads, kv_heads, kv_heads))
    keys_LKDP = torch.zeros(pages + 1, kv_heads, head_dim, size)
    values_LKPD = torch.zeros(pages + 1, kv_heads, size, head_dim)
    ids = [torch.zeros(count, dtype=torch.long) for count in (rows, rows, pages, pages)]
    bias_NP, place_RX = torch.zeros(pages, size), torch.zeros(rows, longest, dtype=torch.long)
    any_size = torch.export.Dim.AUTO
    dynamic = ({0: any_size},) * 10 + ({0: any_size, 1: any_size},)
    example = (q_RHD, k_RKD, v_RKD, keys_LKDP, values_LKPD, *ids, bias_NP, place_RX)
    fresh = package.with_suffix(".fresh.pt2")
    LOG.info("compiling attention for this machine, once: some seconds")
    try:
        program = torch.export.export(_Rows(), example, dynamic_shapes={"tensors": dynamic})
        options = {"assert_indirect_indexing": False}
        torch._inductor.aoti_compile_and_package(program, package_path=str(fresh), inductor_configs=options)
    except (CppCompileError, InvalidCxxCompiler) as error:
        LOG.warning("no working C++ compiler (%s): decoding will be slower", str(error).splitlines()[0])
        return False
    fresh.replace(package)
    return True


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product of matrices that the compiler sees through, and fuses with what comes before and after."""
    return (a[..., None] * b[..., None, :, :]).sum(-2)


class _Rows(torch.nn.Module):
    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return attend_rows(*tensors, multiply=_multiply)  # type: ignore[arg-type, misc]
