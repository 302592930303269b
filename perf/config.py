"""Settings of a project: the table [tool.dynamic-batch.perf] of its pyproject.toml, read and checked.

They are defaults. An option on a command line wins over its setting, a `perf_gate` mark over `tolerances`.
The commands (perf/cli.py) read the table of the folder they are started in, a pytest session (perf/plugin.py)
that of its own root. A leaf: names of metrics are checked by perf/gate/tolerances.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

FILE = "pyproject.toml"
PATH = ("tool", "dynamic-batch", "perf")
APIS = ("chat", "completions")
LIMITS = ("rel", "abs")  # of a tolerance
LATENCIES = ("ttft", "tpot")  # that `slo` bounds, milliseconds
MOST_SECONDS = 7 * 24 * 3600
MOST_SHOWN = 80  # characters of a wrong value
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class SettingsError(ValueError):
    """A table that cannot be used: the message names the file, the key and what it must be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a project; None, or empty, for what its table leaves open.

    target: URL of the server that is measured. served_model: the name that it serves the model by. api:
    "chat" or "completions". model, dtype: as the options of pytest. workloads: names, or files by their path
    from here. tolerances: rel, a fraction, and abs, in the metric's unit, by metric. slo: milliseconds, by
    "ttft" and "tpot". budget: a length of time, as `seconds` takes it. pairs: of processes in an A/B.
    sessions: of a saved run. storage: as --benchmark-storage takes it, from here. args: for pytest. source:
    the file that has them.
    """

    target: str | None = None
    served_model: str | None = None
    api: str | None = None
    model: str | None = None
    dtype: str | None = None
    workloads: tuple[str, ...] = ()
    tolerances: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: _EMPTY)
    slo: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    budget: str | None = None
    pairs: int | None = None
    sessions: int | None = None
    storage: str | None = None
    args: tuple[str, ...] = ()
    source: Path | None = None

    def default(self, parameter: str) -> Any:
        """Return the default that a command's parameter of this name gets, as on a command line; None where
        the settings have none."""
        given = {
            "pytest_args": list(self.args),
            "slo": ",".join(f"{name}={limit:g}" for name, limit in self.slo.items()),
            "workload": list(self.workloads),
            "workloads": list(self.workloads),
        }
        plain = ("target", "served_model", "api", "model", "dtype", "budget", "pairs", "sessions", "storage")
        value = given.get(parameter, getattr(self, parameter) if parameter in plain else None)
        return value or None

    def error(self, key: str, why: str) -> SettingsError:
        """The error of one key."""
        return _error(self.source or Path(FILE), key, why)


def load(start: Path) -> Settings:
    """Read the settings that hold in a folder: of the nearest pyproject.toml with the table, from `start` up.

    The search ends at the top of a repository, the first folder that has a `.git`. Without a table, nothing
    is set.

    Raises:
        SettingsError: for a file that is no TOML, an unknown key, or a value of another kind.
    """
    start = start.resolve()
    for folder in (start, *start.parents):
        path = folder / FILE
        if os.path.isfile(path) and (table := _table(path)) is not None:
            return _settings(path, table)
        if os.path.exists(folder / ".git"):
            break
    return Settings()


def seconds(text: str | float) -> float:
    """Return a length of time in seconds, as options and settings give it: `90`, `90s`, `2m`, `1m30s`,
    `1.5h`.

    Raises:
        ValueError: for what is no length of time, is 0, or is longer than a week.
    """
    number = r"(\d+(?:\.\d*)?)"
    found = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", str(text).strip())
    hours, minutes, rest = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + rest
    if not 0 < total <= MOST_SECONDS:
        wrong = f"{text!r} is no length of time: give seconds (90 or 90s), minutes (2m) or hours (1h)"
        raise ValueError(f"{wrong}, above 0 and {MOST_SECONDS // 3600}h at most")
    return total


def _table(path: Path) -> Mapping[str, Any] | None:
    """The table in a file, None where it has none."""
    try:
        found: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"{_shown(path)} cannot be read as TOML: {' '.join(str(error).split())}"
        ) from None
    for depth, name in enumerate(PATH):
        if name not in found:
            if others := sorted(found) if depth == 2 else []:
                raise SettingsError(
                    f"{_shown(path)}: [{'.'.join(PATH[:depth])}] has no {', '.join(others)}: it has {name}"
                )
            return None
        found = found[name]
        if not isinstance(found, dict):
            raise SettingsError(f"{_shown(path)}: {'.'.join(PATH[: depth + 1])} must be a table")
    return dict(found)


def _settings(path: Path, table: Mapping[str, Any]) -> Settings:
    found: dict[str, Any] = {"source": path}
    for key, value in table.items():
        if key not in _KEYS:
            raise _error(path, _name(key), f"is unknown: the keys are {', '.join(_KEYS)}")
        must_be, fits = _KEYS[key]
        if not fits(value):
            raise _error(path, key, f"= {_value(value)} must be {must_be}")
        found[key.replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    tolerances = found.get("tolerances", {})
    found["tolerances"] = {metric: _limits(path, metric, given) for metric, given in tolerances.items()}
    found["workloads"] = tuple(_file(path.parent, name) for name in found.get("workloads", ()))
    if "://" not in found.get("storage", "://"):
        found["storage"] = _from_here(path.parent, found["storage"])
    return Settings(**found)


def _limits(path: Path, metric: str, given: Any) -> dict[str, float]:
    """A tolerance by its limits; one given as a number is `rel`."""
    limits = given if isinstance(given, dict) else {"rel": given}
    if not _has_numbers(limits, LIMITS):
        must_be = "a fraction as 0.05, or {rel = 0.05, abs = 0.5} or one of these two, each 0 or more"
        raise _error(path, f"tolerances.{_name(metric)}", f"= {_value(given)} must be {must_be}")
    return dict(limits)


def _error(path: Path, key: str, why: str) -> SettingsError:
    return SettingsError(f"{_shown(path)}: [{'.'.join(PATH)}] {key} {why}")


def _shown(path: Path) -> str:
    """A file by its path from here, where that is the shorter one."""
    return min(str(path), _from_here(path.parent, path.name), key=len)


def _from_here(folder: Path, name: str) -> str:
    return os.path.relpath(folder / name)


def _file(folder: Path, name: str) -> str:
    """A workload by its path from here if it is a file, else by its name."""
    return _from_here(folder, name) if os.path.isfile(folder / name) else name


def _name(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _value(value: Any) -> str:
    """A value as an error shows it: on one line, cut where it is long, without the password of a URL."""
    text = re.sub(r"//[^/]*@", "//...@", json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_url(value: Any) -> bool:
    try:
        parts = urlsplit(value) if _is_text(value) else urlsplit("")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:  # brackets that hold no IPv6 address
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_time(value: Any) -> bool:
    try:
        return _is_text(value) and seconds(value) > 0
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _has_numbers(value: Any, names: tuple[str, ...]) -> bool:
    """Return whether a value is a table of numbers by these names, with one of them at least."""
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(names)
        and all(map(_is_number, value.values()))
    )


def _is_slo(value: Any) -> bool:
    return _has_numbers(value, LATENCIES) and all(value.values())


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


_TEXT = ("text, not empty and on one line", _is_text)
_COUNT = ("a whole number of 1 or more", _is_count)
_KEYS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "target": ("the URL of a server, as http://127.0.0.1:8000, without a user or a password", _is_url),
    "served-model": _TEXT,
    "api": (" or ".join(f'"{api}"' for api in APIS), lambda value: value in APIS),
    "model": _TEXT,
    "dtype": _TEXT,
    "workloads": ('a list of names or files, as ["mixed-32"]', _are_texts),
    "tolerances": ("a table of metrics", _is_table),
    "slo": ("a table of milliseconds above 0: {ttft = 200, tpot = 50} or one of the two", _is_slo),
    "budget": ('a length of time as text: "90s", "2m", "1h"', _is_time),
    "pairs": _COUNT,
    "sessions": _COUNT,
    "storage": ("a folder, or file://FOLDER", _is_text),
    "args": ('a list of arguments, as ["perf", "-m", "gpu"]', _are_texts),
}
