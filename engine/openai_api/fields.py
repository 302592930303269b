"""The body of a request, checked: what OpenAI's API and vLLM's additions to it ask of the engine.

A field that is null, or has the value that asks for nothing, always passes. One that asks for what the engine
does not do is refused by name, for the answer would be another than was asked for. One that nobody here knows
is left out, with a warning, once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError, shown
from engine.input_processor import Prompt
from engine.openai_api.api_error import ApiError
from engine.request import SamplingParams

LOG = logging.getLogger(__name__)
MOST_STOPS = 4
MOST_LOGPROBS = 20
COMPLETION_TOKENS = 16  # where a completion says no max_tokens; a chat goes on as long as there is room
MOST_SEEDS = 2**63
Message = dict[str, str]
# Names of theirs, and of the SamplingParams that they are.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "min_tokens": "min_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
OWN = {
    "model", "messages", "prompt", "stream", "stream_options", "logprobs", "top_logprobs", "return_token_ids",
}  # fmt: skip
# What is not done here, and the values that do not ask for it.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,),
    "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "web_search_options": (),
    "length_penalty": (1,), "use_beam_search": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "allowed_token_ids": (), "prompt_logprobs": (), "truncate_prompt_tokens": (), "prompt_embeds": (),
    "logits_processors": ([],), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (), "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
    "return_tokens_as_token_ids": (False,),
}  # fmt: skip
# What changes nothing of an answer.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "request_id", "priority", "verbosity", "cache_prompt", "return_tokens",
    "add_special_tokens",
}  # fmt: skip
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    prompts: of completions, texts or token ids. messages: of a chat, and then there are no prompts. params:
    with max_new_tokens None where a chat may go on as long as there is room.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    messages: tuple[Message, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


def parse(body: bytes) -> dict[str, Any]:
    """Return the fields of a body. Raises ApiError if it is no JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, and of endless numbers
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise ApiError(400, f"this is no JSON: {why}") from None
    if not isinstance(found, dict):
        raise ApiError(400, "this must be a JSON object")
    return found


def read(given: Mapping[str, Any], chat: bool, temperature: float) -> Asked:
    """Return what the fields of a chat completion, or of a completion, ask for.

    Args:
        temperature: where the request has none.

    Raises:
        ApiError: with the name of the field at fault.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    _check_known(fields)
    stream, usage, continuous = _streaming(fields)
    return Asked(
        model=_typed(fields, "model", str),
        prompts=() if chat else _prompts(fields),
        messages=_messages(fields) if chat else (),
        params=_params(fields, chat, temperature),
        stream=stream,
        include_usage=usage,
        continuous_usage=continuous,
        return_token_ids=bool(_typed(fields, "return_token_ids", bool)),
    )


def refused(error: InputError) -> ApiError:
    """Return what the engine said of a request, in the words of the API."""
    names = {ours: theirs for theirs, ours in SAMPLING.items() if theirs != "max_completion_tokens"}
    message = re.sub(r"\b(max|min)_new_tokens\b", r"\1_tokens", str(error))
    first = re.match(r"\w+", str(error))
    name = first.group() if first else ""
    param = names.get(name, name if name in ("prompt", "messages", "logprobs") else None)
    return ApiError(400, message, param)


def _bad(param: str, value: Any, must: str) -> ApiError:
    return ApiError(400, f"{param}={shown(value)} must be {must}", param)


def _check_known(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            words = " or ".join(json.dumps(one) for one in NEUTRAL[name]) or "left out"
            raise ApiError(400, f"{name}={shown(value)} is not supported here: it must be {words}", name)
        if name in OWN or name in SAMPLING or name in NEUTRAL or name in HARMLESS or name in _warned:
            continue
        _warned.add(name[:100])
        LOG.warning("a request has the field %s, which nobody here knows: it is ignored", shown(name))


def _typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise _bad(name, value, {str: "text", bool: "true or false", dict: "an object", list: "a list"}[kind])
    return value


def _streaming(fields: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    options = _typed(fields, "stream_options", dict) or {}
    usage = bool(_typed(options, "include_usage", bool))
    return bool(_typed(fields, "stream", bool)), usage, bool(_typed(options, "continuous_usage_stats", bool))


def _params(fields: Mapping[str, Any], chat: bool, temperature: float) -> SamplingParams:
    given = {ours: fields[theirs] for theirs, ours in SAMPLING.items() if theirs in fields}
    given.setdefault("temperature", temperature)
    if not chat:
        given.setdefault("max_new_tokens", COMPLETION_TOKENS)
    if given.get("top_k") == -1:  # vLLM's word for all
        given["top_k"] = 0
    if given.get("top_p") == 0:
        given["top_p"] = 1e-9
    if isinstance(seed := given.get("seed"), int) and not isinstance(seed, bool):
        given["seed"] = seed % MOST_SEEDS
    if isinstance(stop := given.get("stop"), list) and len(stop) > MOST_STOPS:
        raise _bad("stop", stop, f"at most {MOST_STOPS} strings")
    if given.get("stop") == "":
        del given["stop"]
    try:
        return SamplingParams(**given, logprobs=_logprobs(fields, chat))
    except InputError as error:
        raise refused(error) from None


def _logprobs(fields: Mapping[str, Any], chat: bool) -> int | None:
    name = "top_logprobs" if chat else "logprobs"
    many = fields.get(name)
    if many is not None and (
        isinstance(many, bool) or not isinstance(many, int) or not 0 <= many <= MOST_LOGPROBS
    ):
        raise _bad(name, many, f"a whole number from 0 to {MOST_LOGPROBS}")
    if not chat:
        return many
    wanted = _typed(fields, "logprobs", bool)
    if many and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
    return (many or 0) if wanted else None


def _prompts(fields: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Return the prompts: a text, several, a list of token ids, or several of those."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) for one in prompt):
            return tuple(prompt)
        if all(isinstance(one, int) for one in prompt):
            return (prompt,)
    raise _bad("prompt", prompt, "text, a list of token ids, or a list of either, and not empty")


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", messages, "a list of messages, at least one")
    return tuple(_message(f"messages[{number}]", message) for number, message in enumerate(messages))


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}={shown(message)} must be an object", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role={shown(role)} must be one of {', '.join(ROLES)}", "messages")
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f"{where}.tool_calls is not supported here", "messages")
    return {"role": ROLES[role], "content": _text(f"{where}.content", message.get("content"))}


def _text(where: str, content: Any) -> str:
    """Return a message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            must = "must be text, or a list of parts such as {'type': 'text', 'text': '...'}"
            raise ApiError(400, f"{where}={shown(content)} {must}", "messages")
    return "".join(part["text"] for part in parts)
