"""Saved runs from a storage to the branch and back; nothing is overwritten, and nothing is there twice.

A file that is there already, in the same folder, under the same name and with the same contents, is left
where it is. Everything is checked before anything is written.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.errors import Exit, GateError
from perf.gate.saved_runs import Run, load, merge, read
from perf.gate.storage import STORAGE, folder
from perf.store.branch import ATTEMPTS, Branch, Entry, LostRaceError, waits
from perf.store.layout import Place, append, insert, place_of

MIB = 2**20
MOST_BYTES = 20 * MIB  # of a file


@dataclass(frozen=True, slots=True)
class Moved:
    """A run that was pushed or pulled.

    files: of each new session its path in the storage and on the branch, or the other way, oldest first.
    known: the paths of sessions that were there already. notes: what of its name was left out, and why.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    known: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """The runs on a branch, in the order they were measured in; left_out: what cannot be read, and why."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]


def push(names: Sequence[str], branch: Branch, storage: Path | str = STORAGE) -> list[Moved]:
    """Put runs of a storage on the branch, a commit a run: all of them, or none.

    Args:
        names: as for `perf.gate.saved_runs.load`: a name is all sessions of the last one's commit.

    Raises:
        GateError: code 3, for a run that is not there or is none; code 2, for a name that means several, a
            file that is too large, or a branch that cannot be written.
    """
    root = folder(storage)
    checked = [_checked(name, root) for name in dict.fromkeys(names)]
    runs = [
        (run, [replace(place, oid=branch.keep(text)) for place, text in files.items()])
        for run, files in checked
    ]
    for wait in waits():
        tip = branch.tip()
        there, commit, moved = _alone(branch, branch.entries(tip)), tip, list[Moved]()
        for run, places in runs:
            new, known = _split(places, there)
            put = append(new, there)
            there += put
            moved.append(_moved(run.name, new, put, known, run.notes))
            if put:
                commit = branch.commit(commit, {place.path: place.oid for place in put}, _message(run, put))
        try:
            if commit is not None and commit != tip:
                branch.advance(tip, commit)
            return moved
        except LostRaceError as error:
            why = str(error)
        time.sleep(wait)
    raise GateError(
        f"{ATTEMPTS} times another writer of the {branch} was faster ({why}): push again", Exit.USAGE
    )


def pull(names: Collection[str], branch: Branch, storage: Path | str = STORAGE) -> list[Moved]:
    """Copy runs from the branch into a storage: all, or those of these names.

    Args:
        names: what runs were saved by, or one session's number and name (`0002_main`).

    Raises:
        GateError: code 3, if there is no branch, or no run of a name; code 2, for a file that is too large.
    """
    root, tip = folder(storage), branch.tip()
    if tip is None:
        raise GateError(f"there is no {branch}: python -m perf store push NAME makes it")
    sizes, places = dict[Place, int](), list[Place]()
    for entry in branch.entries(tip):
        if place := place_of(entry.path, entry.oid):
            sizes[place] = entry.size
            places.append(place)
    wanted = _named(names, places, branch)
    for place in wanted:
        _check_size(place.path, sizes[place])
    there = _in_storage(root, wanted)
    moved, writes = list[Moved](), list[tuple[Place, Place]]()
    for name in dict.fromkeys(place.name for place in wanted):
        new, known = _split([place for place in wanted if place.name == name], there)
        put = insert(new, there)
        there += put
        moved.append(_moved(name, new, put, known))
        writes += zip(new, put, strict=True)
    if writes:
        _write(root, [put.path for _, put in writes], branch.contents([new.oid for new, _ in writes]))
    return moved


def stored(branch: Branch, into: Path) -> Stored:
    """The runs on the branch, whose files are copied `into` an empty folder.

    Sessions of one commit, name and folder are one run, as they are to `compare`. Raises as `pull` does.
    """
    found: dict[tuple[object, ...], list[Run]] = {}
    left_out = []
    for _, path in (pair for moved in pull((), branch, into) for pair in moved.files):
        try:
            run = read(into / path)
        except GateError as error:
            left_out.append(str(error).replace(f"{into}{os.sep}", ""))
            continue
        key = Path(path).parent, run.name, *(str(run.commit.get(part)) for part in ("id", "dirty"))
        found.setdefault(key, []).append(run)
    runs = sorted(map(merge, found.values()), key=lambda run: (run.datetime, run.path))
    return Stored(tuple(runs), tuple(left_out))


def _checked(name: str, root: Path) -> tuple[Run, dict[Place, bytes]]:
    """A run that may be pushed, and the contents of its files by their place, whose `oid` is still open."""
    run = load(name, root)
    if not any("" not in benchmark.problems for benchmark in run.benchmarks.values()):
        benchmark = next(iter(run.benchmarks.values()))
        raise GateError(f"run {name!r} has nothing to compare: {benchmark.fullname} {benchmark.problems['']}")
    files = {}
    for path in run.paths:
        whole, top = path.resolve(), root.resolve()
        place = place_of(whole.relative_to(top), "") if whole.is_relative_to(top) else None
        if place is None:
            way_out = "give the name of one that --benchmark-save or perf save put there"
            raise GateError(f"run {name!r} is not in the storage {str(root)!r}: {way_out}", Exit.USAGE)
        contents = path.read_bytes()
        _check_size(str(path), len(contents))
        files[place] = contents
    return run, files


def _check_size(path: str, size: int) -> None:
    if size > MOST_BYTES:
        why = f"has {size / MIB:.1f} MiB, and {MOST_BYTES // MIB} MiB is the most for a file on the branch"
        raise GateError(f"{path} {why}: measure fewer benchmarks or rounds a session", Exit.USAGE)


def _alone(branch: Branch, entries: Iterable[Entry]) -> list[Place]:
    """The places of all files on a branch that may be written: one that has nothing but saved runs.

    Raises:
        GateError: code 2, for a file in a folder that is none.
    """
    found = []
    for entry in entries:
        place = place_of(entry.path, entry.oid)
        if place is not None:
            found.append(place)
        elif "/" in entry.path:
            why = f"has {entry.path}, which is no saved run"
            raise GateError(f"the {branch} {why}: give runs a branch of their own by --branch", Exit.USAGE)
    return found


def _named(names: Collection[str], places: Sequence[Place], branch: Branch) -> list[Place]:
    """The places of these names, or all, by folder and name and in the order of their numbers."""

    def words(place: Place) -> set[str]:
        return {place.name, place.file, place.file.removesuffix(".json")}

    for name in names:
        if not any(name in words(place) for place in places):
            known = ", ".join(sorted({place.name for place in places})) or "none"
            raise GateError(
                f"no run {name!r} on the {branch} (there: {known}): push it from where it was saved"
            )
    wanted = [place for place in places if not names or words(place) & set(names)]
    return sorted(wanted, key=lambda place: (place.folder, place.name, place.number))


def _in_storage(root: Path, wanted: Sequence[Place]) -> list[Place]:
    """The places of the files that are in the folders of a storage where those wanted would be.

    The contents of one with another name are of no concern: its `oid` is empty.
    """
    names = {(place.folder, place.name) for place in wanted}
    form = "sha256" if wanted and len(wanted[0].oid) == 64 else "sha1"
    found = []
    for within in {place.folder for place in wanted}:
        for path in sorted((root / within).glob("*_*.json")):
            one = place_of(path.relative_to(root), "")
            if one and path.is_file():
                alike = (one.folder, one.name) in names
                found.append(replace(one, oid=_blob(path.read_bytes(), form)) if alike else one)
    return found


def _blob(contents: bytes, form: str) -> str:
    """The id that git gives a blob."""
    text = b"blob %d\0" % len(contents) + contents
    return hashlib.new(form, text, usedforsecurity=False).hexdigest()


def _split(places: Sequence[Place], there: Iterable[Place]) -> tuple[list[Place], list[str]]:
    """Places that are new, each contents once, and the paths of those that are known there."""
    known = {one.known_by: one.path for one in there}
    new: dict[object, Place] = {}
    for place in places:
        if place.known_by not in known:
            new.setdefault(place.known_by, place)
    return list(new.values()), [known[place.known_by] for place in places if place.known_by in known]


def _moved(
    name: str, new: Sequence[Place], put: Sequence[Place], known: Sequence[str], notes: Sequence[str] = ()
) -> Moved:
    files = tuple((one.path, other.path) for one, other in zip(new, put, strict=True))
    return Moved(name, files, tuple(known), tuple(notes))


def _message(run: Run, put: Sequence[Place]) -> str:
    commit = str(run.commit.get("id") or "no commit")[:9]
    changed = " with uncommitted changes" if run.commit.get("dirty") else ""
    count = f"{len(put)} session{'s' if len(put) > 1 else ''}"
    return f"{run.name}: {count} of {commit}{changed}, {put[-1].folder or 'no folder'}"


def _write(root: Path, paths: Sequence[str], contents: Iterable[bytes]) -> None:
    """Write files into a storage, each whole, and none before all have been read."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=root) as fresh:
        for number, text in enumerate(contents):
            (Path(fresh) / str(number)).write_bytes(text)
        for number, path in enumerate(paths):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(fresh) / str(number), root / path)
