"""From a caller's prompt, text or token ids, to token ids that the model has.

Whatever is wrong with a prompt is an InputError that names it, and so is what the tokenizer raises on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError, check_list, check_text, plain, shown

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """The checks of a model's prompts, and their encoding.

    Args:
        spec: how errors call the model.
        tokenizer: a Transformers tokenizer, or None.
        vocab_size: token ids of prompts are below it.
        output_size: and those of outputs below this.
        max_positions: positions of a request; `why_no_more` says why not all that the model has.
    """

    spec: str
    tokenizer: Any
    vocab_size: int
    output_size: int
    max_positions: int
    why_no_more: str = ""

    def encode(self, prompt: Prompt, name: str = "prompt", *, continues: bool = False) -> list[int]:
        """Return a prompt's token ids, checked; `name` is what errors call it.

        `continues` is for text that comes after other tokens: it gets no special tokens that begin a text.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(name, prompt, continues)
        else:
            ids = self._listed(name, prompt)
        if not ids:
            raise InputError(f"{name} is empty: give at least one token")
        return ids

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation in the model's chat template, up to its answer.

        Args:
            messages: a user's message, or messages of a `role` and a `content` each.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InputError(f"{self.spec} has no chat template: give the message as a plain prompt")
        name = "message" if isinstance(messages, str) else "messages"
        if isinstance(messages, str):
            told = [{"role": "user", "content": check_text(name, messages)}]
        else:
            listed = check_list(name, messages, "text, or a list of messages")
            told = [_message(f"{name}[{number}]", message) for number, message in enumerate(listed)]
        options = {"add_generation_prompt": True, "return_dict": False}
        return self.tokens(name, lambda: self.tokenizer.apply_chat_template(told, **options))

    def check_positions(self, name: str, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise InputError unless there is a position for each token but the last, which is not fed back."""
        needed = prompt_tokens + max_new_tokens - 1
        if needed > self.max_positions:
            asked = f"{name} of {prompt_tokens} tokens with max_new_tokens={max_new_tokens}"
            has = f"{self.spec} has {self.max_positions}{self.why_no_more}"
            raise InputError(f"{asked} needs {needed} positions; {has}: shorten one of the two")

    def check_stop_ids(self, ids: Sequence[int]) -> None:
        """Raise InputError for an id that no output has."""
        self._check_ids("stop_token_ids", ids, self.output_size)

    def check_stop(self, stop: Sequence[str]) -> None:
        """Raise InputError for stop strings where there is no text to find them in."""
        if stop and self.tokenizer is None:
            problem = f"needs text, but {self.spec} has no tokenizer: use stop_token_ids"
            raise InputError(f"stop={shown(stop)} {problem}")

    def _encode_text(self, name: str, text: str, continues: bool) -> list[int]:
        if self.tokenizer is None:
            raise InputError(f"{name} is text, but {self.spec} has no tokenizer: give token ids")
        options = {"add_special_tokens": False} if continues else {}
        if not check_text(name, text):
            return []
        return self.tokens(name, lambda: self.tokenizer(text, **options).input_ids)

    def tokens(self, name: str, encode: Callable[[], Any]) -> list[int]:
        """Have the tokenizer encode; InputError for whatever it raises, which is the fault of the text."""
        try:
            ids = [int(token) for token in encode()]
        except (KeyboardInterrupt, SystemExit, InputError):
            raise
        except BaseException as error:  # a panic of a tokenizer's Rust code is no Exception
            problem = f"{name} is text that the tokenizer of {self.spec} can't encode: {shown(error)}"
            raise InputError(problem) from error
        most = max(ids, default=0)
        if most >= self.vocab_size:
            token = shown(self.tokenizer.convert_ids_to_tokens(most))
            problem = f"{name} has {token}, token {most} of the tokenizer; the ids of {self.spec} are 0 to"
            raise InputError(f"{problem} {self.vocab_size - 1}: resize its embedding")
        return ids

    def _check_ids(self, name: str, ids: Sequence[int], size: int) -> None:
        if (bad := next((token for token in ids if not 0 <= token < size), None)) is not None:
            raise InputError(f"{name} has token id {shown(bad)}; the ids of {self.spec} are 0 to {size - 1}")

    def _listed(self, name: str, prompt: Any) -> list[int]:
        """Return the ids of a list, a NumPy array or a tensor of whole numbers; the first bad one ends it."""
        if isinstance(prompt, bytes | bytearray | memoryview):
            raise InputError(f"{name}={shown(prompt)} is bytes: decode it to text, or give token ids")
        wrong = InputError(f"{name}={shown(prompt)} must be text or a list of token ids")
        ids: list[int] = []
        try:
            listed = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            if not isinstance(listed, Sequence):
                raise wrong
            for token in map(plain, listed):
                if not isinstance(token, int) or isinstance(token, bool):
                    raise wrong
                self._check_ids(name, (token,), self.vocab_size)
                ids.append(int(token))
        except InputError:
            raise
        except Exception as error:  # a caller's own sequence, a tensor that lies nowhere
            raise InputError(f"{name} can't be read as a list of token ids: {shown(error)}") from error
        return ids


def _message(name: str, message: Any) -> dict[str, str]:
    """Return a message, checked: its role and its content."""
    if not isinstance(message, Mapping):
        raise InputError(f"{name}={shown(message)} must have a role and a content")
    return {key: check_text(f"{name}.{key}", message.get(key)) for key in ("role", "content")}
