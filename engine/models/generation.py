"""A model's generation_config: its defaults of requests are used, what else changes tokens is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InputError, check
from engine.models.errors import ModelError
from engine.request import ResolvedParams, SamplingParams

if TYPE_CHECKING:
    from engine.models.loader import LoadedModel

DEFAULTS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WAY_OUT = "mend the file, or set generation_config='none'"
# What else changes the tokens that `model.generate` gives, and the value by which it changes nothing.
# (max_length yields to max_new_tokens there, of which every request has one.)
IGNORED: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0.0,
    "penalty_alpha": 0.0, "dola_layers": None, "constraints": None, "force_words_ids": None,
    "guidance_scale": 1.0, "min_length": 0, "min_new_tokens": 0, "stop_strings": None, "max_time": None,
    "typical_p": 1.0, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "token_healing": False, "watermarking_config": None,
}  # fmt: skip


def sampling_defaults(loaded: LoadedModel) -> dict[str, Any]:
    """Return the SamplingParams that the model's generation_config states; warn of what else it asks for.

    As with `generate`, its temperature counts only where it says `do_sample`, and is 1 there if none is
    stated; without, decoding is greedy. Its filters count for whoever draws.

    Raises:
        InputError: for a value that can't be, naming the field.
    """
    config = loaded.model.generation_config
    found = {name: getattr(config, name, None) for name in ("do_sample", *DEFAULTS, *IGNORED)}
    stated = {name: value for name, value in found.items() if value is not None}
    check_stated(loaded.spec, stated)
    others = [name for name in stated if name in IGNORED and stated[name] not in (IGNORED[name], [], {}, "")]
    if others:
        named = ", ".join(f"{name}={stated[name]!r}" for name in others)
        warnings.warn(
            f"{loaded.spec}: its generation_config has {named}, which `generate` heeds and this engine does "
            "not: tokens may differ (generation_config='none' leaves the file aside)",
            stacklevel=3,
        )
    defaults = {name: stated[name] for name in DEFAULTS if name in stated}
    if not stated.get("do_sample"):
        defaults.pop("temperature", None)
    else:
        defaults.setdefault("temperature", 1.0)
    return defaults


def with_defaults(params: SamplingParams, defaults: dict[str, Any], room: int) -> ResolvedParams:
    """Return a request's parameters, filled up with a model's defaults.

    The model's max_new_tokens, which nobody asked for, is lowered to the `room` for tokens after the prompt.
    """
    if 0 < room < defaults.get("max_new_tokens", 0):
        defaults = {**defaults, "max_new_tokens": max(room, params.min_new_tokens)}
    return params.resolved(defaults)


def check_stated(source: str, stated: dict[str, Any]) -> None:
    """Raise ModelError, naming the field, where one that matters has a value that can't be (None is none)."""
    try:
        if stated.get("do_sample") is not None:
            check("do_sample", stated["do_sample"], bool)
        ResolvedParams(**{name: stated[name] for name in DEFAULTS if stated.get(name) is not None})
        if isinstance(pad := stated.get("pad_token_id"), str | list | dict):
            raise InputError(f"pad_token_id={pad!r} must be a token id")
    except InputError as error:
        raise ModelError(f"{source}: in its generation_config, {error}; {WAY_OUT}") from error


def read_stated(source: str, **where: Any) -> dict[str, Any]:
    """Return what the generation_config.json of a folder or a hub id says; nothing if there is none.

    Raises:
        ModelError: for a file that holds no JSON object, which Transformers would pass over in silence.
    """
    from transformers.utils import cached_file

    quiet = dict.fromkeys(("missing_entries", "connection_errors"), False)
    options: Any = {f"_raise_exceptions_for_{what}": raises for what, raises in quiet.items()}
    if (path := cached_file(source, "generation_config.json", **options, **where)) is None:
        return {}
    try:
        stated = json.loads(Path(path).read_text(encoding="utf-8"))
        problem = "" if isinstance(stated, dict) else " object"
    except ValueError as error:
        problem = f" ({error})"
    if problem:
        raise ModelError(f"{source}: its generation_config.json is no JSON{problem}: mend it")
    return stated
