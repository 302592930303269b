"""Requests from a file: JSON lines or one JSON array, checked whole before anything is done with it.

Three formats, told apart by the first record: our own, ShareGPT conversations and Mooncake traces. What is
wrong is said by its line (by its number, in an array) and its field. No tokenizer may enter: what a text has
in tokens is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError, check, check_text, shown

BLOCK = 512  # tokens that one hash id of a Mooncake trace stands for
PROMPTS = ("prompt", "messages", "token_ids")
OWN = (*PROMPTS, "output_tokens", "timestamp", "conversation", "delay")
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
ROLES = {  # by what ShareGPT's files call them
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
Messages = tuple[dict[str, str], ...]
Records = list[tuple[str, dict[str, Any]]]  # each with its place in the file


@dataclass(frozen=True, slots=True)
class Row:
    """A request as a file has it.

    Args:
        place: file and line, as errors call it.
        kind: what `asked` is: text ("prompt"), "messages", "token_ids", or the ids of blocks ("hash_ids") of
            which `length` tokens are taken.
        out: tokens of output, or the recorded answer whose tokens are to be counted.
        begins_s: the file's own time of it, in seconds; None if it has none, or follows another.
        follows: index of the row before in its conversation; it is due `after_s` seconds after that answer.
    """

    place: str
    kind: str
    asked: Any
    out: int | str
    length: int = 0
    begins_s: float | None = None
    follows: int | None = None
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Recording:
    """A file's rows in its order. `name` has a digest of the content: what differs has another name."""

    name: str
    rows: tuple[Row, ...]

    @property
    def has_times(self) -> bool:
        """Whether the file says when its requests are due, or how long after an answer."""
        return any(row.begins_s is not None or row.after_s > 0 for row in self.rows)

    @property
    def has_conversations(self) -> bool:
        """Whether any of its requests follows another."""
        return any(row.follows is not None for row in self.rows)


def is_file_name(name: str) -> bool:
    """Return whether a workload's name is that of a file."""
    return name.endswith((".jsonl", ".json")) or "/" in name or os.sep in name


def read_recording(name: str) -> Recording:
    """Return the requests of a file; raise InputError for one that can't be read, and for its first fault."""
    try:
        with open(name, "rb") as file:
            content = file.read()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"workload={shown(name)} is no UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"workload={shown(name)} can't be read: {why}") from None
    records = _records(name, text)
    if not records:
        raise InputError(f"workload={shown(name)} is empty: give a JSON object a line")
    first = records[0][1]
    reader: Callable[[Records], list[Row]] = _read_own
    if "conversations" in first:
        reader = _read_sharegpt
    elif "hash_ids" in first:
        reader = _read_mooncake
    rows = reader(records)
    if not rows:
        raise InputError(f"workload={shown(name)} has no question with an answer: nothing can be asked")
    digest = hashlib.sha256(content).hexdigest()[:8]
    return Recording(f"{os.path.basename(name)}@{digest}", tuple(rows))


def _records(name: str, text: str) -> Records:
    """Return the JSON objects of a file, each with its place."""
    if text.lstrip().startswith("["):
        found = enumerate(_parsed(name, text), 1)
        records = [(f"{name}, record {number}", record) for number, record in found]
    else:
        lines = ((f"{name}, line {number}", line) for number, line in enumerate(text.split("\n"), 1))
        records = [(place, _parsed(place, line)) for place, line in lines if line.strip()]
    for place, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{place}: {shown(record)} must be a JSON object")
    return records


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, too many digits, too deep
        raise InputError(f"{place} can't be read as JSON: {error}") from None


def _read_own(records: Records) -> list[Row]:
    rows: list[Row] = []
    latest: dict[str | int, int] = {}  # by conversation, the index of its last row
    timed = "timestamp" in records[0][1]
    for place, record in records:
        _check_known(place, record, OWN)
        kinds = [kind for kind in PROMPTS if kind in record]
        if len(kinds) != 1:
            has = " and ".join(kinds) or "nothing to ask"
            raise InputError(f"{place} has {has}: give exactly one of {', '.join(PROMPTS)}")
        asked = _CHECKS[kinds[0]](f"{place}: {kinds[0]}", record[kinds[0]])
        out = check(f"{place}: output_tokens", _field(place, record, "output_tokens"), int, 1)
        before = None
        if "conversation" in record:
            conversation = _conversation(place, record["conversation"])
            before = latest.get(conversation)
            latest[conversation] = len(rows)
        if before is not None and rows[before].kind != kinds[0]:
            what = f"{kinds[0]} after {rows[before].kind}"
            raise InputError(f"{place} has {what}: a conversation has one kind throughout")
        times = _times(place, record, before is None, timed)
        rows.append(Row(place, kinds[0], asked, out, 0, times[0], before, times[1]))
    return rows


def _times(place: str, record: dict[str, Any], begins: bool, timed: bool) -> tuple[float | None, float]:
    """Return when a row begins, None if it does not say, and how long after an answer it follows."""
    if not begins:
        if "timestamp" in record:
            way_out = "give delay, seconds after the answer before"
            raise InputError(f"{place}: timestamp is for rows that begin a conversation: {way_out}")
        return None, check(f"{place}: delay", record.get("delay", 0.0), float)
    if "delay" in record:
        raise InputError(f"{place}: delay is for rows that follow one of their conversation: leave it out")
    if ("timestamp" in record) != timed:
        way_out = "give it to all rows that begin, or to none"
        raise InputError(f"{place}: timestamp is {'missing' if timed else 'not in the first row'}: {way_out}")
    return check(f"{place}: timestamp", record["timestamp"], float) if timed else None, 0.0


def _read_sharegpt(records: Records) -> list[Row]:
    """Read conversations; each goes as far as its questions have answers.

    Turns of one role in a row count as one. An answer before the first question is passed over: published
    files have conversations that were cut into several.
    """
    rows: list[Row] = []
    for place, record in records:
        before: int | None = None
        asked: list[dict[str, str]] = []
        for role, text in _turns(place, record):
            if not text.strip():
                break
            if role != "assistant":
                asked.append({"role": role, "content": text})
            elif any(message["role"] == "user" for message in asked):
                rows.append(Row(place, "messages", tuple(asked), text, follows=before))
                before, asked = len(rows) - 1, []
    return rows


def _turns(place: str, record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the role and the text of each turn, those of one role in a row joined."""
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(_listed(place, "conversations", _field(place, record, "conversations"))):
        where = f"{place}: conversations[{number}]"
        if not isinstance(turn, dict):
            raise InputError(f"{where}={shown(turn)} must be an object with from and value")
        who, text = (_field(where, turn, name) for name in ("from", "value"))
        if not isinstance(who, str) or who not in ROLES:
            raise InputError(f"{where}: from={shown(who)} must be one of {', '.join(ROLES)}")
        check_text(f"{where}: value", text)
        if turns and turns[-1][0] == ROLES[who]:
            text = f"{turns.pop()[1]}\n\n{text}"
        turns.append((ROLES[who], text))
    return turns


def _read_mooncake(records: Records) -> list[Row]:
    rows = []
    for place, record in records:
        _check_known(place, record, MOONCAKE)
        at_ms = check(f"{place}: timestamp", _field(place, record, "timestamp"), float)
        length = check(f"{place}: input_length", _field(place, record, "input_length"), int, 1)
        out = check(f"{place}: output_length", _field(place, record, "output_length"), int, 1)
        ids = _whole_numbers(f"{place}: hash_ids", _field(place, record, "hash_ids"))
        if len(ids) != (blocks := -(-length // BLOCK)):
            problem = f"for input_length={length}: with blocks of {BLOCK} tokens there must be {blocks}"
            raise InputError(f"{place}: hash_ids has {len(ids)} ids {problem}")
        rows.append(Row(place, "hash_ids", ids, out, length, at_ms / 1e3))
    return rows


def _check_known(place: str, record: dict[str, Any], known: Sequence[str]) -> None:
    if other := next((name for name in record if name not in known), None):
        raise InputError(
            f"{place} has the field {shown(other)}, which is none of {', '.join(known)}: leave it out"
        )


def _field(place: str, record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise InputError(f"{place}: {name} is missing")
    return record[name]


def _listed(place: str, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{place}: {name}={shown(value)} must be a list")
    return value


def _conversation(place: str, value: Any) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return check_text(f"{place}: conversation", value)


def _text(name: str, value: Any) -> str:
    if not check_text(name, value):
        raise InputError(f"{name} is empty: give at least one character")
    return str(value)


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}={shown(value)} must be a list of whole numbers, at least one")
    for number, one in enumerate(value):
        if type(one) is not int or one < 0:  # traces have millions
            check(f"{name}[{number}]", one, int)
    return tuple(value)


def _messages(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}={shown(value)} must be a list of messages, at least one")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(f"{name}[{number}]={shown(message)} must be an object with role and content")
        _text(f"{name}[{number}].role", message["role"])
        check_text(f"{name}[{number}].content", message["content"])
    return tuple(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text, "messages": _messages, "token_ids": _whole_numbers
}  # fmt: skip
