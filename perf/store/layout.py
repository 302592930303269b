"""Where a saved run lies: `FOLDER/NUMBER_NAME.json`, on the branch as in pytest-benchmark's storage.

The folder is the machine id that pytest-benchmark makes, or several or none. A file is known by its folder,
its name and its contents; the number only gives the order, so that whoever finds his taken gets another.
Nothing here reads or writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from perf.gate.storage import SAVED

# A tree from elsewhere may have any names: of those, none that leads out of a folder, or into a hidden one.
PART = re.compile(r"[^./\\:\0][^/\\:\0]*")


@dataclass(frozen=True, slots=True)
class Place:
    """A saved run's file, whose contents are those of the git blob `oid`."""

    folder: str  # "" at the top
    number: int
    name: str
    oid: str

    @property
    def file(self) -> str:
        return f"{self.number:04d}_{self.name}.json"

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.file}" if self.folder else self.file

    @property
    def known_by(self) -> tuple[str, str, str]:
        return self.folder, self.name, self.oid


def place_of(path: str | Path, oid: str) -> Place | None:
    """The place of a path relative to a storage; None for what no saved run is called."""
    pure = PurePosixPath(path.as_posix() if isinstance(path, Path) else path)
    found = SAVED.fullmatch(pure.name)
    if not found or pure.is_absolute() or not all(PART.fullmatch(part) for part in pure.parts):
        return None
    folder = pure.parent.as_posix()
    return Place("" if folder == "." else folder, int(found[1]), found[2], oid)


def append(new: Sequence[Place], there: Iterable[Place]) -> list[Place]:
    """Places of new files behind all that is there: each keeps its number if that is higher than any.

    So numbers on the branch grow as runs come, whatever number each writer's own storage gave them.
    """
    last: dict[str, int] = {}
    for one in there:
        last[one.folder] = max(one.number, last.get(one.folder, 0))
    found = []
    for one in new:
        number = max(one.number, last.get(one.folder, 0) + 1)
        last[one.folder] = number
        found.append(replace(one, number=number))
    return found


def insert(new: Sequence[Place], there: Sequence[Place]) -> list[Place]:
    """Places of new files beside what is there: their own, but where a path is taken, as `append` gives.

    That holds for all files of a folder and name together, whose order must stay.
    """
    taken = {one.path for one in there}
    clash = {(one.folder, one.name) for one in new if one.path in taken}
    kept = [one for one in new if (one.folder, one.name) not in clash]
    moved = [one for one in new if (one.folder, one.name) in clash]
    return [*kept, *append(moved, [*there, *kept])]
