"""A model as OpenAI's API knows it: its name, and what the engine is asked for a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.engine import Engine
from engine.errors import InputError
from engine.openai_api.answers import Answer
from engine.openai_api.api_error import ApiError
from engine.openai_api.fields import Asked, read, refused
from engine.request import SamplingParams

TEMPERATURE = 1.0  # OpenAI's default, where neither the request nor the model says one


class ServedModel:
    """An engine's model under a name.

    Args:
        engine: that has it.
        name: that requests call it by.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    def read(self, fields: Mapping[str, Any], chat: bool) -> Asked:
        """Return what the fields of a body ask for.

        Raises:
            ApiError: with the name of the field at fault; with status 404 for another model.
        """
        asked = read(fields, chat, float(self.engine.defaults.get("temperature", TEMPERATURE)))
        if asked.model is not None:
            self.check_name(asked.model)
        return asked

    def check_name(self, name: str) -> None:
        """Raise ApiError, with status 404, for a model that is not this one."""
        if name != self.name:
            problem = f"there is no model {name[:200]!r} here: the one that is served is {self.name!r}"
            raise ApiError(404, problem, "model", "model_not_found")

    def prompts(self, asked: Asked) -> list[list[int]]:
        """Return the token ids of every prompt. Raises ApiError for one that the model cannot have."""
        try:
            if asked.is_chat:
                return [self.engine.chat(asked.messages)]
            return [self.engine.encode(prompt) for prompt in asked.prompts]
        except InputError as error:
            raise refused(error) from None

    def params(self, asked: Asked, prompts: Sequence[Sequence[int]]) -> SamplingParams:
        """Return how tokens are drawn: a chat that says no limit gets the room that there is."""
        if asked.params.max_new_tokens is not None or "max_new_tokens" in self.engine.defaults:
            return asked.params
        return replace(asked.params, max_new_tokens=max(1, self.engine.room(len(prompts[0]))))

    def answer(self, asked: Asked, prompts: Sequence[Sequence[int]]) -> Answer:
        """Return the answer to a request, to be filled."""
        return Answer(asked, prompts, self.name, self.engine.tokenizer)
