"""The token ids that a model has, by its weights: what a config says of them, and of EOS, may be wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from engine.models.loader import LoadedModel


def vocabulary(loaded: LoadedModel) -> tuple[int, int]:
    """Return how many ids may go in and how many may come out: rows of the embedding and the output layer.

    Raises:
        InputError: if the model could give a token that it can't read.
    """
    model = loaded.model
    rows = _rows(model.get_input_embeddings(), int(model.config.get_text_config(decoder=True).vocab_size))
    outputs = _rows(model.get_output_embeddings(), rows)
    if outputs > rows:
        raise InputError(
            f"{loaded.spec} has logits for {outputs} tokens and an embedding of {rows}: resize one of them"
        )
    return rows, outputs


def eos_ids(loaded: LoadedModel, outputs: int) -> frozenset[int]:
    """Return the ids of `outputs` that end an output, as with `generate`; a warning names what is none."""
    config = loaded.model.generation_config
    stated = config.eos_token_id if config is not None else None
    given = [(token, _is_id(token) and token < outputs) for token in flat(stated)]
    known = frozenset(int(token) for token, good in given if good)
    if bad := [repr(token) for token, good in given if not good]:
        warnings.warn(
            f"{loaded.spec}: eos_token_id has {', '.join(bad)}, no token of a vocabulary of {outputs}: "
            + ("that ends no output" if known else "outputs end at their limits"),
            stacklevel=3,
        )
    return known


def drop_foreign_pad(spec: str, config: PreTrainedConfig) -> bool:
    """Remove a padding id that is no token: no model is built with it. Warn and return True if there was."""
    text = config.get_text_config(decoder=True)
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is None or size is None or (_is_id(pad) and pad < size):
        return False
    what = f"{spec}: pad_token_id {pad!r} is no token of a vocabulary of {size}: ignored"
    warnings.warn(what, stacklevel=4)
    text.pad_token_id = None
    return True


def _rows(layer: Any, otherwise: int) -> int:
    """Return the rows of a layer's weight; `otherwise` for a layer that a model does without."""
    weight = getattr(layer, "weight", None)
    return otherwise if weight is None else int(weight.shape[0])


def flat(stated: Any) -> Iterator[Any]:
    """Yield the values in a list of lists, or the one that is none; nothing for None."""
    if hasattr(stated, "tolist"):
        stated = stated.tolist()
    if isinstance(stated, list | tuple | set | frozenset):
        for value in stated:
            yield from flat(value)
    elif stated is not None:
        yield stated


def _is_id(token: Any) -> bool:
    """Return whether this is a whole number, if only as JSON writes one (2.0), and not below 0."""
    number = isinstance(token, int | float) and not isinstance(token, bool)
    return number and token >= 0 and token == token // 1
