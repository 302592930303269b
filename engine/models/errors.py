"""Errors of specs that give no model, and of models that cannot run some way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS_OUT = "other ways: a folder, a .gguf file, 'smollm2', 'random:NAME' (see `python -m engine models`)"


class ModelError(InputError):
    """A spec that gives no model: one line with the spec, the problem and the way out."""


def in_one_line(error: BaseException) -> str:
    """Return an exception's message in one line that is not too long."""
    lines = (str(error).strip() or repr(error)).splitlines()
    text = f"{type(error).__name__} {lines[0]}" if isinstance(error, KeyError) else lines[0]
    return text.rstrip(".;: ")[:300]


@contextlib.contextmanager
def refused(model: PreTrainedModel, how: str = "run packed") -> Iterator[None]:
    """Raise an InputError, that the model cannot run so, for whatever its code raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot {how}: {error}") from error
