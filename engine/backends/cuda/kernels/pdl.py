"""How every Triton kernel is launched: on a Hopper GPU each may begin while the one before it ends."""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import torch
import triton
import triton.language as tl


def _dependent() -> dict[str, bool]:
    """Options of a launch: a Hopper GPU may begin a kernel while the one before it ends."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return dict(PDL=True, launch_pdl=True) if able else dict(PDL=False)


DEPENDENT = _dependent()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel be launched: a program calls it as soon as it runs (programmatic dependent
    launch)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for what the kernels before have written, then let the next one be launched, if it has not been.

    Every program of every kernel calls it before it writes, or reads what is neither a weight nor an input of
    the whole step. So a kernel ends only after the one before it has, and nothing is overwritten that is
    still read. A step's inputs are there earlier: its first norm does not call `launch_dependents`, so
    nothing after it begins before they are.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
