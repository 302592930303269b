"""Functions of tensors compiled by TorchInductor, once for a machine and a model's shape, and kept in the cache folder.

Torch alone runs them as operations that each go through memory; compiled, each is a few loops. Ahead of time, so that a
later start loads them in milliseconds and calls carry no guards. What is missing is built side by side, in a process of
its own: Inductor takes seconds to import, and half of its memory is never given back. No function of an engine lives
here.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from engine.machine import cache_dir, cpu_name

LOG = logging.getLogger(__name__)
Function = Callable[..., Sequence[torch.Tensor]]
OPTIONS = {
    "assert_indirect_indexing": False,
    "cpp.vec_isa_ok": True,  # the processor's own list is trusted: a program for each extension takes seconds
    "aot_inductor.precompile_headers": False,  # would pay from about ten functions on
    "aot_inductor.compile_wrapper_opt_level": "O0",  # it calls the loops; those are optimised
    "aot_inductor.enable_line_tables": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # a product is added in one instruction
}
SYMBOLS: dict[Any, str] = {}  # operators that compiled programs may call, and how C declares each


class Compiled:
    """A function of tensors, which torch runs until its compiler has finished."""

    def __init__(self, function: Function) -> None:
        self.run, self.built = function, False

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the function computes."""
        return self.run(*tensors)


@dataclass(frozen=True)
class Order:
    """A package to build: of a function of tensors like the example's, some of whose dimensions are free."""

    function: Function
    example: list[tuple[tuple[int, ...], torch.dtype]]
    dynamic: list[tuple[int, ...]]
    threads: int
    package: Path


@dataclass
class Compiler:
    """Collects functions, then compiles those that this machine has not compiled before."""

    _wanted: dict[str, tuple[Order, Compiled]] = field(default_factory=dict)

    def add(self, function: Function, example: Sequence[torch.Tensor], dynamic: Sequence[Sequence[int]]) -> Compiled:
        """A function to be compiled by `finish`; the same for one that is here already.

        Args:
            function: an object that its `repr`, the source of its module and of those that this takes functions from
                tell from all others; gives a tuple. It can be pickled.
            example: tensors like those to come, as `like` gives them; of each, the sizes in the dimensions listed in
                `dynamic` may differ.
        """
        pairs = zip(example, dynamic, strict=True)
        sizes = [[-1 if at in free else n for at, n in enumerate(x.shape)] for x, free in pairs]
        known = repr((function, sizes))
        if known not in self._wanted:
            threads = torch.get_num_threads()
            what = (
                _sources(function), known, OPTIONS, torch.__version__, cpu_name(),
                torch.backends.cpu.get_cpu_capability(), threads,
            )  # fmt: skip
            digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
            package = cache_dir() / f"{type(function).__name__.lower()}-{digest}.pt2"
            like = [(tuple(x.shape), x.dtype) for x in example]
            order = Order(function, like, [tuple(free) for free in dynamic], threads, package)
            self._wanted[known] = order, Compiled(function)
        return self._wanted[known][1]

    def finish(self) -> None:
        """Build what is missing, and put all that is built in place of what torch runs.

        The first time on a machine this takes half a minute or more, and says so. What can't be compiled, as without a
        C++ compiler, torch goes on running, with a warning.
        """
        orders = [order for order, _ in self._wanted.values()]
        if not all(order.package.exists() for order in orders):
            folder = orders[0].package.parent
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "compiling.lock"):
                _build([order for order in orders if not order.package.exists()])
        for order, compiled in self._wanted.values():
            if order.package.exists():
                compiled.run, compiled.built = _loaded(order.package), True


def like(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without values, to show a compiler."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _sources(function: Function) -> list[str]:
    home = sys.modules[type(function).__module__]
    used = {thing.__module__ for thing in vars(home).values() if inspect.isfunction(thing)}
    ours = {name for name in used if name.partition(".")[0] == __name__.partition(".")[0]}
    return [inspect.getsource(sys.modules[name]) for name in sorted(ours | {home.__name__})]


def _loaded(package: Path) -> Function:
    run = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1).run
    # It takes every tensor to lie as its example did, and does not check: views must be laid out first.
    return lambda *tensors: run([tensor.contiguous() for tensor in tensors])


def _build(orders: list[Order]) -> None:
    """Write the packages of as many orders as can be; warns of a failure."""
    if not orders:
        return
    LOG.warning("compiling %d functions for this machine, once: half a minute or more", len(orders))
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from engine.compiled import main; main()"]
    done = subprocess.run(command, input=pickle.dumps(orders), env=paths, capture_output=True)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        LOG.warning("not compiled (%s): decoding will be slower", last[0])


def main() -> None:
    """Write the packages that stdin orders, side by side where the system can fork; exits with 1 if one failed."""
    orders: list[Order] = pickle.load(sys.stdin.buffer)
    # Once for all children: Inductor's import, and what it finds out about the processor. One after the other: its
    # modules import each other, and two threads that do so at once find some half made.
    import torch._inductor.compile_fx  # noqa: F401

    _look_at_processor()
    if not hasattr(os, "fork"):
        for order in orders:
            write(order)
        return
    children = []
    for order in orders:
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    write(order)
                    code = 0
                except Exception as error:
                    print(f"{type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(codes))


def _look_at_processor() -> None:
    from torch._inductor.cpu_vec_isa import config, valid_vec_isa_list

    with config.patch(OPTIONS):
        valid_vec_isa_list()


def write(order: Order) -> None:
    """Compile to a file.

    Raises:
        TypeError: if what the function computes holds for one size only, where sizes shall be free.
    """
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    shapes = tuple(dict.fromkeys(free, torch.export.Dim.AUTO) for free in order.dynamic)
    symbols = {operator: [symbol] for operator, symbol in SYMBOLS.items()}
    options = {**OPTIONS, "cpp.threads": order.threads, "aot_inductor.custom_ops_to_c_shims": symbols}
    fresh = order.package.with_suffix(".fresh.pt2")
    example = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in order.example)
    program = torch.export.export(_Module(order.function), example, dynamic_shapes={"tensors": shapes})
    given = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    for sizes, free in zip(given, order.dynamic, strict=True):
        if any(is_concrete_int(sizes[at]) for at in free):
            raise TypeError(f"{order.function} gives a free size a meaning: {sizes}")
    torch._inductor.aoti_compile_and_package(program, package_path=str(fresh), inductor_configs=options)
    fresh.replace(order.package)


class _Module(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.function(*tensors)
