"""Log of the file that each module of a Python process came from: `perf ab` proves its blocks by it.

A copy of this file is the `sitecustomize` of every Python process of a block, workers included, whatever
Python they run. It judges nothing (perf/ab/import_proof.py does) and costs nothing but at imports. There is
a file a process, named by its number, and in it a line an entry, which is the `ascii()` of a tuple:

    ("process", command, folders of the standard library, of site-packages, and of the whole installation)
    ("module", name, file), ("library", file) and ("child", number, command) of a Python that this one started
    ("ended", number), if this one waited for it, and no signal ended it
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ENV = 10  # of Popen's arguments after the first, the number of the one that is the environment


def start(folder: str) -> None:
    """Log this process to `folder` from now to its end, and then be the sitecustomize that this one hides."""
    write = _writer(folder)
    seen = set()

    def note(name: str, file: Any) -> None:
        if not isinstance(file, str) or (name, file) in seen:
            return
        seen.add((name, file))
        if os.path.isabs(file) or os.path.exists(file):  # else it is only a label, such as torch gives some
            write("module", name, os.path.abspath(file))

    def note_loaded() -> None:
        for name, module in list(sys.modules.items()):
            known = getattr(module, "__dict__", None)  # asking the module itself might import more
            if isinstance(known, dict):
                spec: Any = known.get("__spec__")
                note(name, spec.origin if getattr(spec, "has_location", False) else known.get("__file__"))

    def end() -> None:
        note_loaded()
        for file in _libraries():
            write("library", file)

    write()
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    if script not in ("", "-", "-c", "-m") and os.path.exists(script):
        note("__main__", os.path.abspath(script))  # which may import nothing, and then be killed
    note_loaded()
    _watch_imports(note)
    _watch_children(folder, write)
    atexit.register(end)  # the first to be registered is the last to run
    _become_the_hidden_one(folder)


def _writer(folder: str) -> Callable[..., None]:
    """A function that adds a line to its process's file, in a fork too, and where a test replaces `os`."""
    opened, written, closed, number = os.open, os.write, os.close, os.getpid
    join, flags = os.path.join, os.O_WRONLY | os.O_APPEND | os.O_CREAT
    about = ("process", list(getattr(sys, "orig_argv", [])), *_folders())
    begun = set()

    def write(*entry: Any) -> None:
        lines = [entry] if entry else []
        if number() not in begun:
            begun.add(number())
            lines.insert(0, about)
        try:
            file = opened(join(folder, str(number())), flags, 0o644)
        except FileNotFoundError:
            return  # the block is over, and this process has outlived it
        try:
            written(file, "".join(ascii(line) + "\n" for line in lines).encode())
        finally:
            closed(file)

    return write


def _folders() -> tuple[list[str], list[str], list[str]]:
    """Where this Python has its standard library, packages, and all that was installed with it."""
    import site

    standard = [os.path.dirname(os.__file__)]
    archive = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    standard += [path for path in sys.path if path.endswith(("lib-dynload", archive))]
    users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    prefixes = {sys.prefix, sys.base_prefix, sys.base_exec_prefix}
    return standard, [*site.getsitepackages(), *users], sorted(prefixes)


def _watch_imports(note: Callable[[str, Any], None]) -> None:
    """Note what is loaded, when it is: a worker may be killed, and leave no end to look at it from.

    Whatever found a module, and wherever it will be kept, it is made by this one function.
    """
    machinery: Any = sys.modules["_frozen_importlib"]
    make = machinery.module_from_spec

    def module_from_spec(spec: Any) -> Any:
        module = make(spec)
        note(spec.name, spec.origin if getattr(spec, "has_location", False) else None)
        note("__main__", getattr(sys.modules.get("__main__"), "__file__", None))
        return module

    machinery.module_from_spec = module_from_spec
    if "importlib.util" in sys.modules:
        sys.modules["importlib.util"].module_from_spec = module_from_spec  # type: ignore[attr-defined]


def _watch_children(folder: str, write: Callable[..., None]) -> None:
    """Have each Python that is started log too, whatever its environment; note it, for some ignore theirs."""
    import functools
    import subprocess

    popen: Any = subprocess.Popen
    begin = popen.__init__

    def started(self: Any, args: Any, *others: Any, **options: Any) -> None:
        words = [args] if isinstance(args, (str, bytes, os.PathLike)) else args
        command = [os.fsdecode(word) for word in words] if isinstance(words, (list, tuple)) else []
        if options.get("shell") or len(others) >= ENV or not _is_python(command):
            return begin(self, args, *others, **options)
        env = os.environ if options.get("env") is None else options["env"]
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        if folder not in paths:
            options["env"] = {**env, "PYTHONPATH": os.pathsep.join([folder, *filter(None, paths)])}
        begin(self, args, *others, **options)
        write("child", self.pid, command)
        mine.add(self.pid)

    def noting_the_end(look: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(look)
        def looked(self: Any, *args: Any, **options: Any) -> Any:
            found = look(self, *args, **options)
            if self.returncode is not None and self.pid in mine:
                mine.remove(self.pid)
                if self.returncode >= 0:
                    write("ended", self.pid)
            return found

        return looked

    mine: set[int] = set()
    started.__wrapped__ = begin  # type: ignore[attr-defined]
    popen.__init__ = started
    popen.wait, popen.poll = noting_the_end(popen.wait), noting_the_end(popen.poll)


def _is_python(command: list[str]) -> bool:
    """Return whether a command is a Python that will run something, not only say its version."""
    name = os.path.basename(command[0]) if command else ""
    named = name.rstrip("0123456789.t") in ("python", "pypy") or command[:1] == [sys.executable]
    return named and not any(word in ("-V", "-VV", "--version", "-h", "--help") for word in command[1:2])


def _libraries() -> list[str]:
    """The files of which this process has code in its memory, where the system says so."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            rows = [line.rstrip("\n").split(None, 5) for line in maps]
    except OSError:
        return []
    return sorted({row[5] for row in rows if len(row) == 6 and "x" in row[1] and row[5].startswith("/")})


def _become_the_hidden_one(folder: str) -> None:
    """Run the `sitecustomize` that Python would have run if this one were not there."""
    from importlib.machinery import PathFinder

    others = [path for path in sys.path if os.path.abspath(path) != folder]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = sys.modules["_frozen_importlib"].module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    start(os.path.dirname(os.path.abspath(__file__)))
