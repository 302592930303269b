"""The error of a spec that gives no model."""

from __future__ import annotations

from engine.errors import InputError

WAYS_OUT = "other ways: a folder, a .gguf file, 'smollm2', 'random:NAME' (see `python -m engine models`)"


class ModelError(InputError):
    """A spec that gives no model: one line with the spec, the problem and the way out."""


def in_one_line(error: BaseException) -> str:
    """What an exception of a library says, in one line that is not too long."""
    lines = (str(error).strip() or repr(error)).splitlines()
    text = f"{type(error).__name__} {lines[0]}" if isinstance(error, KeyError) else lines[0]
    return text.rstrip(".;: ")[:300]
