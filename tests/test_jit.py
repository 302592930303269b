"""Compilation by parts and wholes. It overrides methods of Numba that no release promises to keep or to call:
a Numba that ignores one of them fails here, where elsewhere it would only be slow."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit
from numba.core import codegen
from numba.core.errors import TypingError

from engine.backends.cpu import jit


@pytest.fixture
def total():
    """`total(n)` is compiled and calls a part, both new: what is compiled already calls no compiler."""

    @jit.part()
    def squares(n):
        found = 0
        for i in range(n):
            found += i * i
        return found

    @njit
    def total(n):
        return squares(n) + 1

    total.part = squares
    return total


def hooks(kind: type) -> list[str]:
    """Return the names of the methods and properties that a class defines."""
    return [
        name
        for name, member in vars(kind).items()
        if inspect.isfunction(member) or isinstance(member, property)
    ]


def test_each_method_overrides_one_of_numba():
    for kind in (jit._PartLibrary, jit._PartCompiler, jit._WholeCompiler):
        assert kind.__mro__[1].__module__.startswith("numba.")
        for name in set(hooks(kind)) - {"set_env"}:
            assert hasattr(kind.__mro__[1], name), name
    assert hasattr(codegen.JITCPUCodegen, "set_env"), "which a part's library stands in for"


def test_each_override_is_called_for_a_part_and_none_for_a_whole(monkeypatch, total):
    called: list[tuple[str, str]] = []  # the name of a hook, and of the function that was compiled

    def record(kind: type, name: str) -> None:
        member = vars(kind)[name]
        work = member.fget if isinstance(member, property) else member

        def recorded(self, *args):
            result = work(self, *args)
            library = self if isinstance(self, jit._PartLibrary) else self.state.library
            called.append((name, library.name))
            return result

        monkeypatch.setattr(kind, name, property(recorded) if isinstance(member, property) else recorded)

    expected = set()
    for kind in (jit._PartLibrary, jit._PartCompiler):
        for name in hooks(kind):
            record(kind, name)
            expected.add((name, total.part.py_func.__qualname__))
    assert total(4) == 15
    assert set(called) == expected


def test_a_part_is_neither_optimised_nor_a_program_and_the_whole_is_both(monkeypatch, total):
    programs = []
    add = codegen.JITCPUCodegen._add_module

    def record(self, module):
        programs.append(module.name)
        return add(self, module)

    monkeypatch.setattr(codegen.JITCPUCodegen, "_add_module", record)
    assert total(4) == 15
    [whole], [part] = total.overloads.values(), total.part.overloads.values()
    assert [name for name in programs if "squares" in name] == []
    assert [name for name in programs if "total" in name] == [whole.library.name]
    assert isinstance(part.library, jit._PartLibrary)
    assert not isinstance(whole.library, jit._PartLibrary)
    written, code = (str(result.library.get_function(result.fndesc.mangled_name)) for result in (part, whole))
    assert "alloca" in written, "variables in memory, as Numba writes them"
    assert "alloca" not in code
    assert "call" not in code, "the part's code is in the whole's"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_whole_is_compiled_without_a_garbage_collector(monkeypatch, enabled):
    seen = []
    compile_extra = jit.compiler.Compiler.compile_extra

    def record(self, func):
        seen.append(gc.isenabled())
        return compile_extra(self, func)

    monkeypatch.setattr(jit.compiler.Compiler, "compile_extra", record)
    monkeypatch.setattr(jit.numba, "njit", lambda f, cache, **options: njit(f, **options))
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        assert jit.whole(lambda x: x + 1)(2) == 3
        assert (seen, gc.isenabled()) == ([False], enabled)
        with pytest.raises(TypingError):
            jit.whole(lambda x: x.nothing)(2)
        assert (seen, gc.isenabled()) == ([False] * 2, enabled)
    finally:
        gc.enable() if before else gc.disable()


def test_nothing_counts_references_to_arrays():
    """`_nrt` is an option that Numba does not document."""

    def last_of_each(rows, found):
        for n in range(len(rows)):
            row = rows[n]
            found[n] = row[len(row) - 1]

    counting, not_counting = njit(last_of_each), njit(last_of_each, **jit.OPTIONS)
    rows, found = np.arange(6.0).reshape(2, 3), np.zeros(2)
    for function in (counting, not_counting):
        function(rows, found)
        assert found.tolist() == [2, 5]
        found[:] = 0
    [with_counts], [without] = (function.inspect_asm().values() for function in (counting, not_counting))
    assert "NRT_" in with_counts
    assert "NRT_" not in without


def test_a_program_that_cannot_be_kept_is_compiled_all_the_same(monkeypatch, caplog):
    right = jit.numba.njit

    def refuse(function, cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return right(function, **options)

    monkeypatch.setattr(jit.numba, "njit", refuse)
    assert jit.whole(lambda x: x + 1)(2) == 3
    assert "not kept (no locator available)" in caplog.text


@pytest.mark.slow
def test_a_step_is_compiled_once_a_machine_and_is_the_same_from_then_on(tmp_path):
    """Processes of their own, for a function that is compiled here stays in this one."""
    code = """
from engine import Engine, EngineConfig, SamplingParams, load
engine = Engine(load("random:tiny-llama"), EngineConfig(kv_memory=2**22))
[output] = engine.generate([list(range(3, 40))], SamplingParams(max_new_tokens=8, logprobs=5))
print(*[x.hex() for token in output.logprobs for _, x in token.top])
from engine.backends.cpu.forward import forward
print(len(forward.stats.cache_hits), len(forward.stats.cache_misses))
"""
    env = {**os.environ, "DYNAMIC_BATCH_CACHE": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, first_stats), (second, second_stats) = (run.stdout.splitlines() for run in runs)
    assert (first_stats, second_stats) == ("0 1", "1 0")
    assert first == second
    assert len(list(tmp_path.glob("numba-*/*/forward.forward*.nbc"))) == 1
