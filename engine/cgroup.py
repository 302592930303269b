"""The memory and processors that Linux's control groups leave this process, as in a container.

A process is in one group of each hierarchy (version 1 has one a controller, version 2 one for all, and a
system may have both), and whatever limits a group limits all groups in it: so every ancestor that can be seen
counts. Files lie where `/proc/self/mountinfo` says that a hierarchy, or a part of it, is mounted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> int | None:
    """Return the bytes that the tightest group leaves; None if no group has a limit that can be read.

    Pages of files that are not in use count as left, as Docker and Kubernetes count them: they go when memory
    is wanted.

    Args:
        root: where the file tree begins.
    """
    left = []
    for group in _groups("memory", root):
        stat = _fields(group / "memory.stat")
        names = ("memory.max", "memory.high", "memory.limit_in_bytes")
        limits = [number for name in names if (number := _number(group / name)) is not None]
        if "hierarchical_memory_limit" in stat:  # of ancestors too that a container does not see
            limits.append(stat["hierarchical_memory_limit"])
        if limits:
            used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
            unused_files = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            left.append(max(0, min(limits) - max(0, used - unused_files)))
    return min(left, default=None)


def processors(root: Path = ROOT) -> float | None:
    """Return how many processors the tightest group may fill; None if no limit can be read."""
    shares = []
    for group in _groups("cpu", root):
        words = _text(group / "cpu.max").split()
        if len(words) != 2:
            words = [_text(group / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        quota, period = (int(word) if word.isdecimal() else 0 for word in words)  # "max" and -1 are no limit
        if quota and period:
            shares.append(quota / period)
    return min(shares, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, each followed by its ancestors."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) < 3:  # not a line of that file
            continue
        number, controllers, path = parts[0], parts[1], parts[2].removesuffix(" (deleted)")
        if controller not in controllers.split(",") and (number, controllers) != ("0", ""):
            continue
        for shown, mount in _mounts("" if not controllers else controller, root):
            inside = Path(path).relative_to(shown) if Path(path).is_relative_to(shown) else Path()
            if ".." in inside.parts:  # the mount shows our own group, by another name
                inside = Path()
            yield from (mount / part for part in (inside, *inside.parents) if (mount / part).is_dir())


def _mounts(controller: str, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield each mount of a controller's hierarchy, version 2's if "": the group shown there, the folder."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        words, rest = before.split(" "), after.split(" ")
        if len(words) < 5 or len(rest) < 3:  # not a line of that file
            continue
        kind, options = rest[0], rest[-1]
        if kind == ("cgroup" if controller else "cgroup2") and controller in ("", *options.split(",")):
            # a space is written as backslash 040
            shown, folder = (
                re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word) for word in words[3:5]
            )
            yield shown, root / folder.lstrip("/")


def _text(file: Path) -> str:
    """Return a file's text without its last newline; nothing if it cannot be read."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _fields(file: Path) -> dict[str, int]:
    """Return numbers by their names, of a file with a line for each."""
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
