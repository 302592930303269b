"""Functions of tensors compiled by TorchInductor, once for a machine and a model's shape, and kept in the cache folder.

Torch alone runs them as operations that each go through memory; compiled, each is a few loops. Ahead of time, so that a
later start loads them in milliseconds and calls carry no guards. No function of an engine lives here.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from engine.machine import cache_dir, cpu_name

LOG = logging.getLogger(__name__)
Function = Callable[..., Sequence[torch.Tensor]]


def compiled(
    function: Function, example: Sequence[torch.Tensor], dynamic: Sequence[Sequence[int]], *key: Any
) -> Function:
    """What `function` computes from tensors; itself where there is no C++ compiler.

    The first time on a machine this takes about ten seconds, and says so.

    Args:
        function: an object whose class's source, `repr` and `key` tell it from all others; gives a tuple.
        example: tensors like those to come; of each, the sizes in the dimensions listed in `dynamic` may differ.
    """
    pairs = zip(example, dynamic, strict=True)
    sizes = [[-1 if at in free else n for at, n in enumerate(x.shape)] for x, free in pairs]
    what = (
        inspect.getsource(type(function)), function, key, sizes, torch.__version__, cpu_name(),
        torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(),
    )  # fmt: skip
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    package = cache_dir() / f"{type(function).__name__.lower()}-{digest}.pt2"
    package.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{package}.lock"):
        if not package.exists() and not _build(package, function, example, dynamic):
            return function
    run = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1).run
    # It takes every tensor to lie as its example did, and does not check: views must be laid out first.
    return lambda *tensors: run([tensor.contiguous() for tensor in tensors])


def _build(
    package: Path, function: Function, example: Sequence[torch.Tensor], dynamic: Sequence[Sequence[int]]
) -> bool:
    """Compile to a file; False, and a warning, where that can't be done."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    fresh = package.with_suffix(".fresh.pt2")
    LOG.warning("compiling %s for this machine, once: about ten seconds", type(function).__name__)
    shapes = tuple(dict.fromkeys(free, torch.export.Dim.AUTO) for free in dynamic)
    options = {
        "assert_indirect_indexing": False,
        "cpp.vec_isa_ok": True,  # the processor's own list is trusted: a program for each extension takes seconds
        "aot_inductor.precompile_headers": False,  # would pay from about ten functions on
        "aot_inductor.compile_wrapper_opt_level": "O0",  # it calls the loops; those are optimised
        "aot_inductor.enable_line_tables": False,
    }
    try:
        distinct = tuple(x.clone() for x in example)  # the same tensor twice would be taken for one argument
        program = torch.export.export(_Module(function), distinct, dynamic_shapes={"tensors": shapes})
        torch._inductor.aoti_compile_and_package(program, package_path=str(fresh), inductor_configs=options)
    except (CppCompileError, InvalidCxxCompiler) as error:
        LOG.warning("no working C++ compiler (%s): decoding will be slower", str(error).splitlines()[0])
        return False
    fresh.replace(package)
    return True


class _Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.function(*tensors)
