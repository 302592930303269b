"""Objects of a JSON file, read key by key: what is not there, or not of its kind, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf.errors import Exit, GateError
from perf.gate.metrics import is_amount


class Fields:
    """An object of a file. where: the words for it in an error: the file, and the way to the object.

    path: the file. Every method that reads a key raises GateError unless its value is of that kind.
    """

    def __init__(self, path: Path, data: Mapping[str, Any], where: str) -> None:
        self.path, self.data, self.where = path, data, where

    def __contains__(self, key: object) -> bool:
        return self.data.get(str(key)) is not None

    def number(self, key: str) -> float:
        """A finite number of 0 or more."""
        return float(self._of_kind(key, is_amount(self._value(key)), "a number of 0 or more"))

    def count(self, key: str) -> int:
        """A whole number of 0 or more."""
        return int(self._of_kind(key, _is_count(self._value(key)), "a whole number of 0 or more"))

    def text(self, key: str) -> str:
        value = self._value(key)
        return str(self._of_kind(key, isinstance(value, str) and bool(value), "text"))

    def inner(self, key: str) -> Fields:
        """An object."""
        value = self._of_kind(key, isinstance(self._value(key), dict), "an object")
        return Fields(self.path, value, f"{self.where}, {key}")

    def items(self, key: str) -> list[Any]:
        return list(self._of_kind(key, isinstance(self._value(key), list), "a list"))

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        found = self.items(key)
        self._of_kind(key, all(isinstance(one, dict) for one in found), "a list of objects")
        return [Fields(self.path, one, f"{self.where}, {key}[{at}]") for at, one in enumerate(found)]

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers of 0 or more."""
        found = self.items(key)
        self._of_kind(key, all(map(is_amount, found)), "a list of numbers of 0 or more")
        return [float(one) for one in found]

    def counts(self, key: str) -> list[int]:
        """A list of whole numbers of 0 or more."""
        found = self.items(key)
        self._of_kind(key, all(map(_is_count, found)), "a list of whole numbers of 0 or more")
        return found

    def lists(self, key: str) -> list[list[float]]:
        """A list of lists of finite numbers of 0 or more."""
        found = self.items(key)
        right = all(isinstance(one, list) and all(map(is_amount, one)) for one in found)
        self._of_kind(key, right, "a list of lists of numbers of 0 or more")
        return found

    def refuse(self, why: str) -> GateError:
        """The error of a file that is not fit to be imported."""
        return GateError(f"{self.where}: {why}")

    def _value(self, key: str) -> Any:
        if key not in self.data:
            raise self.refuse(f"has no {key!r}, which results of this tool have")
        return self.data[key]

    def _of_kind(self, key: str, right: bool, kind: str) -> Any:
        if not right:
            raise self.refuse(f"{key!r} is not {kind}")
        return self.data[key]


def _is_count(value: object) -> bool:
    return is_amount(value) and isinstance(value, int)


def read_objects(path: Path) -> list[Fields]:
    """Read the objects of a file: one of JSON, or one a line.

    Raises:
        GateError: if the file is not there (code 2), is empty, or has anything else in it.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise GateError(f"{str(path)!r} {what}: name a file that the tool wrote", Exit.USAGE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GateError(f"{str(path)!r} cannot be read: {error}") from None
    if not text.strip():
        raise GateError(f"{str(path)!r} is empty: the tool wrote no result")
    try:
        found = [json.loads(text)]
    except (ValueError, RecursionError):
        found = _lines(path, text)
    if not all(isinstance(one, dict) for one in found):
        raise GateError(f"{str(path)!r} has no JSON object in it: it is no file of a load tool")
    many = len(found) > 1
    return [Fields(path, one, f"{path}, line {at}" if many else f"{path}") for at, one in enumerate(found, 1)]


def _lines(path: Path, text: str) -> list[Any]:
    """The values of a file that has one a line."""
    found = []
    for at, line in enumerate(text.split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise GateError(f"{str(path)!r} is not JSON (line {at}: {error}): run the tool again") from None
    return found
