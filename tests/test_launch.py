"""Kernels are bound and inspected once for each kind of arguments, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

launch = pytest.importorskip("engine.backends.cuda.kernels.launch", reason="needs Triton")


class Jit:
    """Stands for a JITFunction: tells what it was asked to compile, and what was launched of that."""

    def __init__(self, compiles: bool = True) -> None:
        names = "x", "n", "SIZE", "PDL"
        self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]
        self.compiles, self.compiled, self.launched = compiles, [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.compiled.append((grid, args, constants))
            number = len(self.compiled)
            return Compiled(self.launched, number) if self.compiles else None

        return run


class Compiled:
    def __init__(self, launched, number):
        self.launched, self.number = launched, number

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((self.number, grid, *args))


def test_what_is_compiled_is_launched_again_for_arguments_of_the_same_kind():
    jit = Jit()
    kernel, x, y = launch.Kernel(jit), torch.zeros(64), torch.ones(64)
    constants = dict(SIZE=64, num_warps=4)
    kernel[(3,)](x, 32, **constants)
    kernel[2, 5](y, 48, **constants)
    assert len(jit.compiled) == 1
    assert jit.compiled[0][2] == constants | launch.DEPENDENT
    assert jit.launched == [(1, (2, 5, 1), y, 48, 64, launch.DEPENDENT["PDL"])]


@pytest.mark.parametrize("other", [
    (torch.zeros(64, dtype=torch.float16), 32), (torch.zeros(65)[1:], 32), (torch.zeros(64), 33),
    (torch.zeros(64), 1), (torch.zeros(64), 2**40), (torch.zeros(64), 32.0),
], ids=str)  # fmt: skip
def test_another_type_alignment_or_number_is_compiled_for_itself(other):
    jit = Jit()
    kernel = launch.Kernel(jit)
    for arguments in ((torch.zeros(64), 32), other, other):
        kernel[(1,)](*arguments, SIZE=64)
    assert [args for _, args, _ in jit.compiled] == [(jit.compiled[0][1]), other]
    assert len(jit.launched) == 1
    assert jit.launched[0][0] == 2
    kernel[(1,)](torch.zeros(64), 32, SIZE=128)
    assert len(jit.compiled) == 3


def test_the_interpreter_compiles_nothing():
    jit = Jit(compiles=False)
    kernel = launch.Kernel(jit)
    for _ in range(2):
        kernel[(1,)](torch.zeros(4), 1, SIZE=4)
    assert len(jit.compiled) == 2
