"""The one resolver of saved runs to files, for every command and for `--perf-baseline`.

A run is named by its path, by the number or the name that pytest-benchmark saved it under, or by both
(`0002_main`). Runs saved under one name in one folder are sessions of one run, which that name means; a word
that fits several other files is refused with all of them listed; a folder is never a run. It opens no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.errors import Exit, GateError

STORAGE = Path(".benchmarks")
SAVED = re.compile(r"([0-9]{4,})_(.+)\.json", re.DOTALL)  # as pytest-benchmark's FileStorage names a file
NOT_IN_A_NAME = set(r"\/:*?<>|")  # what --benchmark-save refuses


@dataclass(frozen=True, slots=True)
class Found:
    """The file of a run, the last one of a name; earlier: others that were saved under that name, oldest
    first."""

    path: Path
    earlier: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class _Saved:
    """A file in the storage, taken apart."""

    path: Path
    number: int
    name: str


def folder(storage: Path | str) -> Path:
    """The folder of a storage, given as `--benchmark-storage` takes it: a path or file://PATH.

    It is read as pytest-benchmark's `load_storage` does, which itself would make a folder that is not there.

    Raises:
        GateError: for any other URL, Elasticsearch among them.
    """
    if isinstance(storage, Path) or "://" not in storage:
        return Path(storage)
    scheme, place = storage.split("://", 1)
    if scheme == "file":
        return Path(place)
    what = "is an Elasticsearch index" if scheme.startswith("elasticsearch") else "is no folder"
    way_out = "give a folder, file://FOLDER, or the path of a file that --benchmark-json wrote"
    raise GateError(f"storage {scheme}://... {what}: only saved files can be compared; {way_out}", Exit.USAGE)


def check_name(name: str) -> None:
    """Raise GateError, with code 2, for a name that no run can be saved by."""
    if not name or NOT_IN_A_NAME & set(name):
        bad = " ".join(sorted(NOT_IN_A_NAME))
        raise GateError(f"{name!r} is no name to save by: give one without any of {bad}", Exit.USAGE)


def resolve(which: str | Path, storage: Path | str = STORAGE) -> Found:
    """Find a saved run.

    Args:
        which: a path (a Path, or text with a slash in it), or a word: a file's name here, a number (`7` or
            `0007`), a name or both (`0007_main`) of a run in the storage. A name means all that was saved
            under it in one folder.
        storage: as for `folder`.

    Raises:
        GateError: if there is no such run (code 3), or a word means several files (code 2).
    """
    word = str(which)
    if not word:
        raise GateError("run '' names nothing: give a name, a number or a path", Exit.USAGE)
    if isinstance(which, Path) or os.sep in word or (os.altsep and os.altsep in word):
        if not os.path.isfile(word):
            raise _no_file(word)
        return Found(Path(word))
    root = folder(storage)
    saved = list(_saved(root))
    meant: dict[Path, str] = {}  # a file by what makes it one, the first reason kept
    if os.path.isfile(word):  # Path.is_file raises for a name too long to be one
        meant[Path(word)] = f"./{word} (a file here)"
    named = [run for run in saved if run.name == word]
    newest = [run for run in named if run.number == max(one.number for one in named if _beside(one, run))]
    numbered = [run for run in saved if re.fullmatch("[0-9]{1,18}", word) and run.number == int(word)]
    whole = [run for run in saved if word in (run.path.stem, run.path.name)]
    for runs, how in ((numbered, "its number"), (whole, "its file's name"), (newest, "its name")):
        for run in runs:
            meant.setdefault(run.path, f"{run.path} ({how})")
    different = {path.resolve(): path for path in reversed(meant)}
    if not different:
        raise _missing(word, root, saved)
    if len(different) > 1:
        raise _ambiguous(
            word, {path: how for path, how in meant.items() if path in different.values()}, saved
        )
    (path,) = different.values()
    beside = sorted((run.number, run.path) for run in named if run.path.parent == path.parent)
    by_name = path in [run.path for run in newest]  # which outranks a number: that has other ways to be said
    return Found(path, tuple(other for _, other in beside[:-1]) if by_name else ())


def groups(storage: Path | str) -> list[tuple[Path, ...]]:
    """The files saved under one name in one folder, oldest first, of every name that has two or more."""
    found: dict[tuple[Path, str], list[tuple[int, Path]]] = {}
    for run in _saved(folder(storage)):
        found.setdefault((run.path.parent, run.name), []).append((run.number, run.path))
    return [tuple(path for _, path in sorted(files)) for files in found.values() if len(files) > 1]


def _beside(one: _Saved, other: _Saved) -> bool:
    return one.path.parent == other.path.parent


def _no_file(word: str) -> GateError:
    what = "is a folder" if os.path.isdir(word) else "is not there"
    return GateError(
        f"run {word!r} {what}: name a .json file that --benchmark-json or --benchmark-save wrote"
    )


def _saved(root: Path) -> Iterator[_Saved]:
    if not root.is_dir():
        return
    for path in sorted(root.rglob("*_*.json")):
        parts = SAVED.fullmatch(path.name)
        if parts and path.is_file():
            yield _Saved(path, int(parts[1]), parts[2])


def _missing(word: str, root: Path, saved: list[_Saved]) -> GateError:
    if Path(word).suffix == ".json":
        return _no_file(word)
    here = f"; {word!r} here is a folder" if os.path.isdir(word) else ""
    hint = "give a path" if NOT_IN_A_NAME & set(word) else f"save one with --benchmark-save={word}"
    if not root.is_dir():
        return GateError(f"no run {word!r}: there is no storage {str(root)!r}{here}; {hint}")
    known = ", ".join(sorted({run.name for run in saved})) or "none"
    return GateError(f"no run {word!r} in {str(root)!r} (saved there: {known}){here}: {hint}")


def _ambiguous(word: str, meant: dict[Path, str], saved: list[_Saved]) -> GateError:
    taken = [run.path.stem for run in saved] + [run.name for run in saved]
    full = [path.stem for path in meant if taken.count(path.stem) == 1 and not os.path.isfile(path.stem)]
    what = f"run {word!r} is ambiguous, it is in {' and in '.join(meant.values())}"
    other = f", or its full form ({', '.join(full)})" if full else ""
    return GateError(f"{what}: give the path of the file you mean{other}", Exit.USAGE)
