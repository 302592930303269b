"""Proof of where a block's code came from: its own revision's tree or real installed files, nothing else.

Every Python process of a block logs its modules (perf/import_log.py). Whatever else Python may have found is
refused: the checkout's copy by way of PYTHONPATH, a `.pth` file, an editable install, a link or a working
folder; another clone; what was installed from the checkout. Else both sides would measure the same code, and
no slowdown could ever show.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from perf import import_log
from perf.runs import GateError
from perf.trees import PLACES, git

TOOL = Path(__file__).resolve().parent
INSTALLED_IN = frozenset({"site-packages", "dist-packages"})
# Where compilers keep the modules that they generate: by the variable that names it, or where it is without.
CACHES = {"XDG_CACHE_HOME": "~/.cache", "TRITON_CACHE_DIR": "~/.triton", "HF_MODULES_CACHE": ""}
CACHES |= {"TORCHINDUCTOR_CACHE_DIR": "", "TORCH_EXTENSIONS_DIR": ""}
COMMAND_LENGTH = 120


class Place(Enum):
    """What a folder is to a block."""

    TREE = "in the revision's own tree"
    INSTALLED = "installed"
    GENERATED = "generated, by code that is one of the two"
    CHECKOUT = "a checkout's copy and not the revision's"
    COPY = "a copy that was installed from the checkout"
    OTHER = "another than the package of that name in the revision's tree"
    ELSEWHERE = "neither in the revision's tree nor installed"


ALLOWED = frozenset({Place.TREE, Place.INSTALLED, Place.GENERATED})


@dataclass
class Log:
    """What one process wrote: its command, the folders of its Python, its entries; see perf/import_log.py."""

    command: tuple[str, ...] = ()
    standard: tuple[str, ...] = ()
    site: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    modules: list[tuple[str, str]] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    children: list[tuple[int, list[str]]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Log:
        """The log in a file; a last line that its process was killed over is no entry."""
        log = cls()
        kind: str
        entry: list[Any]
        for line in path.read_text(encoding="ascii").splitlines(keepends=True):
            kind, *entry = ast.literal_eval(line) if line.endswith("\n") else ("",)
            if kind == "process":
                log.command, log.standard, log.site, log.prefixes = map(tuple, entry)
            elif kind == "module":
                log.modules.append((entry[0], entry[1]))
            elif kind == "library":
                log.libraries.append(entry[0])
            elif kind == "child":
                log.children.append((entry[0], entry[1]))
        return log


@dataclass(frozen=True)
class Surroundings:
    """What all blocks have around them.

    top: of the checkout. checkouts: every working tree of its repository, those of the revisions too. copies:
    files that were installed from one of them. since: when it all began, by the file system's clock; what is
    newer was made by a block.
    """

    top: Path
    checkouts: tuple[Path, ...]
    copies: frozenset[Path]
    since: float

    @classmethod
    def of(cls, top: Path, trees: Sequence[Path]) -> Surroundings:
        """Those of a checkout whose revisions' trees have just been made."""
        listed = git(top, "worktree", "list", "--porcelain").splitlines()
        found = [line.removeprefix("worktree ") for line in listed if line.startswith("worktree ")]
        checkouts = tuple(dict.fromkeys(_real(str(path)) for path in [top, *found, *trees]))
        since = min(tree.stat().st_ctime for tree in trees)
        return cls(top.resolve(), checkouts, frozenset(_installed_from(checkouts)), since)


@dataclass(frozen=True)
class Watch:
    """One block: the tree that it measures, and the folder in which its processes log what they import."""

    folder: Path
    tree: Path
    around: Surroundings

    @classmethod
    def begin(cls, folder: Path, tree: Path, around: Surroundings) -> Watch:
        """Make the folder, with what every Python process that has it on its path runs first."""
        folder.mkdir()
        shutil.copyfile(import_log.__file__, folder / "sitecustomize.py")
        return cls(folder.resolve(), tree.resolve(), around)

    def environment(self) -> dict[str, str]:
        """The block's environment: imports from its tree before all else, and every process logging them."""
        own = environment(self.tree, self.around.top)
        return {**own, "PYTHONPATH": os.pathsep.join([str(self.folder), own["PYTHONPATH"]])}

    def check(self, name: str) -> None:
        """Look through what the processes of the block logged; `name` is what the block is called.

        Raises:
            GateError: code 3, naming what was imported from where it must not be, or a process that logged
                nothing.
        """
        logs = {int(path.name): Log.read(path) for path in self.folder.glob("[0-9]*")}
        if not logs:
            raise GateError(f"{name}: no process logged its imports, so nobody can say what was measured")
        faults = [(log, *fault) for _, log in sorted(logs.items()) for fault in self._faults(log)]
        if faults:
            log, module, file, place = faults[0]
            others = len({fault[1] for fault in faults}) - 1
            more = f" (and {others} more)" if others else ""
            by = "" if log.command[1:3] == ("-m", "pytest") else f" by {_words(log.command)}"
            raise GateError(
                f"{name}: {module}{more} was imported{by} from {file}, which is {place.value}: "
                f"{self._way_out(module, file, place)}"
            )
        for log in logs.values():
            for number, command in log.children:
                if number not in logs:
                    raise GateError(
                        f"{name}: nobody can say what {_words(command)} imported, for it ignores its "
                        "environment: start it without -I, -E and -S"
                    )

    def _faults(self, log: Log) -> Iterator[tuple[str, str, Place]]:
        """Module, file and place of whatever a process imported from where it must not be."""
        places = self._places(log)
        own = {path.parent.name for root in _roots(self.tree) for path in root.glob("*/__init__.py")}
        for module, file in log.modules:
            place = self._place(file, places, log)
            if place is Place.INSTALLED and module.partition(".")[0] in own:
                place = Place.OTHER
            if place not in ALLOWED:
                yield module, file, place
        places |= {_real(prefix): Place.INSTALLED for prefix in log.prefixes}
        for file in log.libraries:
            if _innermost(_real(file), places) is Place.CHECKOUT:
                yield f"the shared library {Path(file).name}", file, Place.CHECKOUT

    def _places(self, log: Log) -> dict[Path, Place]:
        """What each known folder is to a process; of folders in one another the innermost is meant."""
        caches = [os.environ.get(name) or usual for name, usual in CACHES.items()]
        places = {_real(os.path.expanduser(cache)): Place.GENERATED for cache in caches if cache}
        places |= dict.fromkeys(self.around.checkouts, Place.CHECKOUT)
        if not any(checkout in TOOL.parents for checkout in self.around.checkouts):
            places |= {TOOL: Place.INSTALLED, TOOL.with_name("engine"): Place.INSTALLED}
        places |= {_real(path): Place.INSTALLED for path in (*log.standard, *log.site)}
        return places | {self.folder: Place.INSTALLED, self.tree: Place.TREE}

    def _place(self, file: str, places: dict[Path, Place], log: Log) -> Place:
        real = _real(file)
        known = _innermost(real, places)
        if real in self.around.copies and known is not Place.TREE:
            return Place.COPY
        if known is not None:
            return known
        if INSTALLED_IN.intersection(real.parts) or _inside(file, log.standard):
            return Place.INSTALLED
        # A link in site-packages is either to somebody's checkout, or to an installer's own store.
        if _inside(file, log.site) and not any((parent / ".git").exists() for parent in real.parents):
            return Place.INSTALLED
        there = next(path for path in (real, *real.parents) if path.exists())  # of what an archive has, that
        fresh = there.stat().st_ctime >= self.around.since
        made = any(part.startswith("torchinductor_") for part in real.parts)
        return Place.GENERATED if fresh or made else Place.ELSEWHERE

    def _way_out(self, module: str, file: str, place: Place) -> str:
        """What the user can do about a module that came from the wrong place."""
        real, top = _real(file), self.around.top
        root = real.parents[min(len(module.split(".")) - (real.stem != "__init__"), len(real.parents) - 1)]
        if place is Place.OTHER:
            return "uninstall it"
        if place is Place.COPY:
            return "uninstall it, and put the folder that the checkout has it in on PYTHONPATH"
        if _inside(file, [str(self.tree)]):
            return "the revision has a link that leads there: have the file itself in its place"
        if not real.is_relative_to(top):
            return "install it, and not with -e, or have it in the revision's tree"
        if not (self.tree / real.relative_to(top)).exists():
            return "the revision has no such file: commit it, or install it, and not with -e"
        if self.tree / root.relative_to(top) in _roots(self.tree):
            return "the revision has this file too: let no path and no working folder lead into the checkout"
        path = os.path.relpath(root) if Path.cwd().is_relative_to(top) else root
        return f"set PYTHONPATH={path}, which is then looked up in each revision's tree"


def environment(tree: Path, top: Path | None = None) -> dict[str, str]:
    """This process's environment, with imports from `tree` (or its src folder) first.

    What PYTHONPATH has of the checkout at `top` is taken from the same place in `tree`; relative paths start
    here.
    """
    paths = [str(root) for root in (tree, tree / "src")]
    for path in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        real = _real(path)
        paths.append(str(tree / real.relative_to(top)) if top and real.is_relative_to(top) else path)
    kept = {key: value for key, value in os.environ.items() if key not in PLACES}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _installed_from(checkouts: Iterable[Path]) -> Iterator[Path]:
    """The files of every distribution that was built from something in one of these; links do not count."""
    for distribution in metadata.distributions():
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        place = urlsplit(str(origin.get("url", "")))
        if place.scheme != "file" or origin.get("dir_info", {}).get("editable"):
            continue
        source = _real(unquote(place.path))
        if any(source.is_relative_to(checkout) for checkout in checkouts):
            yield from (_real(str(distribution.locate_file(file))) for file in distribution.files or ())


def _roots(tree: Path) -> list[Path]:
    """The folders of a tree that imports start from."""
    return [tree, tree / "src"]


def _real(path: str) -> Path:
    return Path(os.path.realpath(path))


def _inside(file: str, folders: Iterable[str]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def _innermost(file: Path, places: dict[Path, Place]) -> Place | None:
    return next((places[folder] for folder in (file, *file.parents) if folder in places), None)


def _words(command: Iterable[str]) -> str:
    words = " ".join(shlex.join(command).split())
    return words if len(words) <= COMMAND_LENGTH else f"{words[:COMMAND_LENGTH]}…"
