"""How every Triton kernel is launched: cheaply, and on a Hopper GPU so that each may begin while the one
before it ends, and ask for what the next ones read."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl


def _dependent() -> dict[str, bool]:
    """Options of a launch: a Hopper GPU may begin a kernel while the one before it ends."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return dict(PDL=True, launch_pdl=True) if able else dict(PDL=False)


DEPENDENT = _dependent()


class Kernel:
    """A Triton kernel that is launched as Triton's own, `kernel[grid](*arguments, **constants)`, but cheaply.

    Its first argument is a tensor, its constants come last, and every call names them in the same order.

    Triton binds and inspects all arguments at every launch. Here what it would compile for (types, alignment,
    whether a number is 1 or a multiple of 16) is looked up, and what it has compiled is launched at once.

    Args:
        jit: has its constants last.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self._constants = [
            parameter.name for parameter in getattr(jit, "params", ()) if parameter.is_constexpr
        ]
        self._known: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches so many programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        key = (
            tuple(constants.values()),
            torch.cuda.current_device() if args[0].is_cuda else -1,
            *map(_kind, args),
        )
        known = self._known.get(key)
        if known is not None:
            compiled, values = known
            compiled[(*grid, 1, 1)[:3]](*args, *values)
            return
        constants |= DEPENDENT
        compiled = self.jit[grid](*args, **constants)
        if compiled is not None:  # the interpreter compiles nothing
            self._known[key] = compiled, tuple(constants[name] for name in self._constants)


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a kernel, with what `triton.jit` takes."""
    return lambda function: Kernel(triton.jit(**options)(function))


def _kind(argument: Any) -> Any:
    """Return what of an argument a kernel is compiled for, or more."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if isinstance(argument, int):
        return argument == 1, argument & 15 == 0, argument.bit_length() > 31
    return type(argument)


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel be launched: a program calls it as soon as it runs (programmatic dependent
    launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for what the kernels before have written, then let the next one be launched, if it has not been.

    Every program of every kernel calls it before it writes, or reads what is neither a weight, nor an input
    of the whole step, nor keys and values of earlier steps. So a kernel ends only after the one before it
    has, and nothing is overwritten that is still read. A step's inputs are there earlier: its first norm does
    not call `launch_dependents`, so nothing after it begins before they are.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


CHUNK = tl.constexpr(2048)  # bytes that a thread asks for at a time


@triton.jit
def prefetch_l2(weight, BYTES: tl.constexpr, program, programs, THREADS: tl.constexpr, PDL: tl.constexpr):
    """Have the L2 cache read a contiguous weight, of which each of `programs` asks for a share.

    Kernels that leave memory idle call it for a product that is two or three launches ahead: a layer of a
    small model is less than an H200's 50 MB of L2. It waits for nothing itself.

    Args:
        THREADS: of a program.
    """
    if PDL:
        i_I = tl.arange(0, THREADS)
        for chunk in range(program * THREADS, BYTES // CHUNK, programs * THREADS):
            # the instruction wants an address of a multiple of 16 bytes
            at_I = (weight.to(tl.int64, bitcast=True) & -16) + (chunk + i_I).to(tl.int64) * CHUNK
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.lt.s32 p, $2, $3; "
                "@p cp.async.bulk.prefetch.L2.global [$1], 2048; mov.b32 $0, 0; }",
                "=r,l,r,r", [at_I, chunk + i_I, BYTES // CHUNK], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
