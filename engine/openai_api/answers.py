"""Answers as OpenAI's API has them: whole, or in chunks of a stream.

What clients rely on: the chunks of a stream share id, creation time and model; `choices` is always there;
`finish_reason` is null until the last chunk of a choice; the role comes with the first content, for a chunk
without any would be taken for the first token; and a chunk without text is sent only where token ids were
asked for.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from engine.openai_api.api_error import ApiError
from engine.openai_api.fields import Asked
from engine.request import FinishReason, RequestOutput, StreamChunk
from engine.step import TokenLogprob

DONE = b"data: [DONE]\n\n"


class Answer:
    """The answer to one request.

    Args:
        asked: the request.
        prompts: token ids of its prompts, of which each has a choice.
        model: the name that the client knows the model by.
        tokenizer: for the text of tokens whose probabilities are told.
    """

    def __init__(self, asked: Asked, prompts: Sequence[Sequence[int]], model: str, tokenizer: Any) -> None:
        self.asked, self.model = asked, model
        self.created = int(time.time())
        self.id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.choices = [Choice(asked, number, prompt, tokenizer) for number, prompt in enumerate(prompts)]

    def event(self, index: int, chunk: StreamChunk) -> bytes | None:
        """Return the event for what a step gave a choice; None where there is nothing to tell yet.

        Raises:
            ApiError: if the choice could not be finished.
        """
        told = self.choices[index].add(chunk)
        if told is None:
            return None
        whole = self._whole([told])
        if self.asked.continuous_usage:
            whole["usage"] = self.usage()
        if self.asked.is_chat and self.asked.return_token_ids and not self.choices[index].told:
            whole["prompt_token_ids"] = list(self.choices[index].prompt)
        self.choices[index].told = True
        return event(whole)

    def last_event(self) -> bytes | None:
        """Return the event that tells the usage, if it was asked for."""
        if not self.asked.include_usage:
            return None
        return event(self._whole([]) | {"usage": self.usage()})

    def whole(self) -> dict[str, Any]:
        """Return the whole answer, once every choice has ended.

        Raises:
            ApiError: if one of them could not be finished.
        """
        whole = self._whole([choice.whole() for choice in self.choices]) | {"usage": self.usage()}
        if self.asked.is_chat and self.asked.return_token_ids:
            whole["prompt_token_ids"] = list(self.choices[0].prompt)
        return whole

    def usage(self) -> dict[str, Any]:
        """Return how many tokens there are so far."""
        prompt = sum(len(choice.prompt) for choice in self.choices)
        output = sum(choice.tokens for choice in self.choices)
        outputs = [choice.output for choice in self.choices]
        cached = sum(one.metrics.prompt_tokens_cached for one in outputs if one is not None)
        counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    def _whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self.asked.is_chat:
            kind = "chat.completion.chunk" if self.asked.stream else "chat.completion"
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return about | {"choices": choices}


class Choice:
    """One choice of an answer, as it grows."""

    def __init__(self, asked: Asked, index: int, prompt: Sequence[int], tokenizer: Any) -> None:
        self.asked, self.index, self.prompt, self._tokenizer = asked, index, prompt, tokenizer
        self.tokens = 0
        self.told = False  # whether anything of it has been
        self.output: RequestOutput | None = None
        self._ids: list[int] = []  # not told yet
        self._logprobs: list[TokenLogprob] = []
        self._offset = 0  # of the text that comes next

    def add(self, chunk: StreamChunk) -> dict[str, Any] | None:
        """Take what a step gave, and return what to tell of it."""
        self.tokens += len(chunk.token_ids)
        self._ids += chunk.token_ids
        self._logprobs += chunk.logprobs
        self.output = chunk.output
        reason = None if chunk.output is None else finish_reason(chunk.output)
        if not (chunk.text or reason or (self.asked.return_token_ids and self._ids)):
            return None
        return self._told(chunk.text, reason, self._ids, self._logprobs)

    def take(self, output: RequestOutput) -> None:
        """Take all of it at once."""
        self.tokens, self.output = len(output.token_ids), output

    def whole(self) -> dict[str, Any]:
        """Return all of it, for an answer that is not streamed."""
        assert self.output is not None
        ids, logprobs = list(self.output.token_ids), list(self.output.logprobs or ())
        told = self._told(self.output.text or "", finish_reason(self.output), ids, logprobs)
        if self.asked.is_chat:
            told["message"] = {"role": "assistant", "content": ""} | told.pop("delta")
        return told

    def _told(
        self, text: str, reason: str | None, ids: list[int], logprobs: list[TokenLogprob]
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"index": self.index}
        if not self.asked.is_chat:
            told["text"] = text
        else:
            role = {} if self.told else {"role": "assistant"}
            told["delta"] = role | ({"content": text} if text or role else {})
        told["logprobs"] = self._told_logprobs(logprobs) if self.asked.params.logprobs is not None else None
        told["finish_reason"] = reason
        if reason is not None and self.output is not None:
            told["stop_reason"] = self.output.stop_reason
        if self.asked.return_token_ids:
            told["token_ids"] = ids
            if not self.asked.is_chat and not self.told:
                told["prompt_token_ids"] = list(self.prompt)
        self._offset += len(text)
        self._ids, self._logprobs = [], []
        return told

    def _told_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        def token(token_id: int, logprob: float) -> dict[str, Any]:
            text = self._text(token_id)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        if self.asked.is_chat:
            content = [
                token(one.token_id, one.logprob) | {"top_logprobs": [token(*other) for other in one.top]}
                for one in logprobs
            ]
            return {"content": content}
        texts = [self._text(one.token_id) for one in logprobs]
        offsets, at = [], self._offset
        for text in texts:
            offsets.append(at)
            at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [
                {self._text(other): value for other, value in one.top} | {text: one.logprob}
                for one, text in zip(logprobs, texts, strict=True)
            ],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        """Return a token's own text, which special tokens have too."""
        return str(self._tokenizer.decode([token_id])) if self._tokenizer is not None else f"{token_id}"


def finish_reason(output: RequestOutput) -> str:
    """Return "stop" or "length".

    Raises:
        ApiError: for a request that ended otherwise.
    """
    if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return str(output.finish_reason)
    if output.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "the request was aborted: the server is ending")
    raise ApiError(500, f"the model failed on this request: {output.error}")


def event(told: dict[str, Any]) -> bytes:
    """Return a server-sent event. It ends in two line feeds: some clients know no other end."""
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"
