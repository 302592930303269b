"""Pytest arguments that select some benchmarks alone, made of those that selected more.

Test ids take the place of the paths, and options stay. What is a path is not always plain to see (`-k perf`
in a repository with a folder `perf`); where it is not, the arguments stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from posixpath import normpath

from perf.ab.revisions import git

FLAG = re.compile(r"-[qvxsl]+|--(verbose|quiet|exitfirst|quick|require-gpu|strict-markers|strict-config)")
BEFORE_VALUE = re.compile(r"-[kmpoWr]|--(backend|ignore|ignore-glob|deselect|override-ini|confcutdir|tb)")
WITH_VALUE = re.compile(r"-[kmpoWr].+|--[a-zA-Z0-9][^=]*=.*", re.DOTALL)
MOVES_IDS = re.compile(r"--|--pyargs|--rootdir(=.*)?|-c.*|--config-file(=.*)?|@.*", re.DOTALL)


def options_of(args: Sequence[str], tree: Collection[str]) -> list[str] | None:
    """The arguments without paths and test ids; None where it is not certain which ones those are.

    Args:
        tree: the files and folders that there are. What follows an option and is none of these is its value:
            pytest would not have run with such a path.
    """
    kept: list[str] = []
    before = ""
    for arg in args:
        after_option = before.startswith("-") and not (FLAG.fullmatch(before) or WITH_VALUE.fullmatch(before))
        if BEFORE_VALUE.fullmatch(before):
            kept.append(arg)
            before = ""
            continue
        if MOVES_IDS.fullmatch(arg):
            return None
        if arg.startswith("-"):
            kept.append(arg)
        elif after_option:
            if _path(arg) in tree:
                return None  # the value of an option that only a plugin knows, or a path
            kept.append(arg)
        before = arg
    return kept


def narrowed(args: Sequence[str], fullnames: Sequence[str], top: Path, commits: Sequence[str]) -> list[str]:
    """The arguments that select the benchmarks `fullnames` (test ids) and no others, else `args` as they are.

    Args:
        top: the repository, from whose top paths in `args` count.
        commits: those that must have the files of all these benchmarks, at the path that their ids say; else
            ids count from elsewhere, or were given for a file that has moved.
    """
    listed = (git(top, "ls-tree", "-r", "-t", "-z", "--full-tree", "--name-only", one) for one in commits)
    tree = set.intersection(*(set(names.split("\0")) for names in listed))
    options = options_of(args, tree)
    if options is None or not all("::" in name and _path(name) in tree for name in fullnames):
        return list(args)
    return [*options, *fullnames]


def _path(argument: str) -> str:
    """The path in an argument or a test id, as git writes it."""
    return normpath(argument.split("::", 1)[0])
