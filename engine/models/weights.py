"""Copies of a model that share its weights."""

from __future__ import annotations

import copy
from itertools import chain

from transformers import PreTrainedModel


def weight_sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` that shares every weight and buffer with it, and may be changed otherwise."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo=shared)
