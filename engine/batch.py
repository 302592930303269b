"""`python -m engine batch`: a file of requests in, one of answers out, in the format of OpenAI's Batch API.

A line of input has a `custom_id`, a `method`, a `url` and a `body`; a line of output its `custom_id` and a
`response`, or an `error` where the line was no request at all. Answers are written as they come, and are on
the disk before they count as done, so that a run which is killed at any moment goes on where it was. Which
lines are done is read from the output itself: its ids are the numbers of the lines of input.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.engine import Engine
from engine.errors import InputError, shown
from engine.openai_api.answers import Answer
from engine.openai_api.api_error import ApiError
from engine.openai_api.fields import parse, refused
from engine.openai_api.served_model import ServedModel
from engine.progress import Progress
from engine.request import Request

LOG = logging.getLogger(__name__)
URLS = {"/v1/chat/completions": True, "/v1/completions": False}  # whether it is a chat
AHEAD = 2  # batches of requests that wait for a place: a step never lacks any, and memory is bounded
ID = "batch_req_"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of input: its number, from 1, and its text. custom_id: its own name, None where it has none."""

    number: int
    text: bytes
    custom_id: str | None


Answering = Callable[[Iterator[Row]], Iterator[list[dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to: lines in all, done before it, answered, and refused or failed."""

    rows: int
    before: int
    answered: int
    failed: int


def run(engine: Engine, name: str, source: Path, target: Path, *, progress: bool = True) -> Summary:
    """Answer every line of a file that has no answer yet.

    Args:
        name: that requests call the model by.
        source, target: files of JSON lines; what is in the target already stands.

    Raises:
        InputError: before any work, for a file that cannot be read or written, or a target that has answers
            to another file, or is being written by another process.
    """
    batch = Batch(ServedModel(engine, name))
    return answer_file(source, target, batch.answer, lambda: batch.rate, progress)


def answer_file(
    source: Path, target: Path, answer: Answering, rate: Callable[[], float] | None, progress: bool
) -> Summary:
    """Have every line of a file answered that has no answer yet, and each answer on the disk.

    Args:
        answer: gives the records of lines, some at a time, in any order.
        rate: output tokens a second so far, if it is known.
    """
    answered = failed = 0
    with _opened(source, target) as (rows, out):
        done, whole = _done(out, target)
        total = _check_same(_rows(rows), done, source, target)
        out.truncate(whole)  # of a line that was being written when the last run was killed
        left = (row for row in _rows(rows) if row.number not in done)
        with Progress("batch", total, unit="requests", shown=progress) as bar:
            bar.advance(len(done))
            for records in answer(left):
                _write(out, records)
                good = sum(bool(one["response"]) and one["response"]["status_code"] == 200 for one in records)
                answered, failed = answered + good, failed + len(records) - good
                bar.advance(len(records), None if rate is None else f"batch, {rate():,.0f} tokens/s")
    return Summary(total, len(done), answered, failed)


class Batch:
    """Requests that one engine answers together."""

    def __init__(self, model: ServedModel) -> None:
        self._model, self._engine = model, model.engine
        self._jobs: dict[Request, tuple[Row, Answer, int]] = {}  # of which answer it is which choice
        self._ended: list[Request] = []
        self._began = time.perf_counter()

    @property
    def rate(self) -> float:
        """Output tokens a second, since it began."""
        return self._engine.metrics.counters.output_tokens / (time.perf_counter() - self._began)

    def answer(self, rows: Iterator[Row]) -> Iterator[list[dict[str, Any]]]:
        """Give the records of all lines, those that a step has ended at a time.

        Raises:
            RuntimeError: if the engine can compute nothing any more; what had not ended has no record then.
        """
        most, more = AHEAD * self._engine.config.max_batch_size, True
        while more or self._jobs:
            records: list[dict[str, Any]] = []
            while more and len(self._engine.scheduler.waiting) < most:
                if (row := next(rows, None)) is None:
                    more = False
                else:
                    records += self._begin(row)
            if self._jobs:
                self._step()
            for request in self._ended:
                records += self._take(request)
            self._ended.clear()
            if records:
                yield records

    def _begin(self, row: Row) -> list[dict[str, Any]]:
        """Queue the request of a line; give its record where it cannot be served."""
        try:
            fields, chat = _request(row)
        except ApiError as error:
            return [_record(row, None, {"code": "invalid_line", "message": error.message})]
        try:
            self._queue(row, fields, chat)
        except ApiError as error:
            return [_record(row, error)]
        return []

    def _queue(self, row: Row, fields: dict[str, Any], chat: bool) -> None:
        """Queue the requests of a line, one for each prompt. Raises ApiError where one cannot be served."""
        asked = self._model.read(fields, chat)
        if asked.stream:
            raise ApiError(400, "stream=true is not for a batch: leave it out", "stream")
        prompts = self._model.prompts(asked)
        answer, params = self._model.answer(asked, prompts), self._model.params(asked, prompts)
        requests: list[Request] = []
        try:
            for index, prompt in enumerate(prompts):
                own = replace(params, seed=self._seed(row, index)) if params.seed is None else params
                requests.append(self._engine.add_request(prompt, own))
        except InputError as error:
            for request in requests:
                self._engine.abort(request.id)
            raise refused(error) from None
        for index, request in enumerate(requests):
            self._jobs[request] = row, answer, index
            request.on_end = self._ended.append

    def _seed(self, row: Row, index: int) -> int:
        """Return a seed that depends on the line alone, however often a run was killed."""
        mixed = np.random.SeedSequence([self._engine.config.seed, row.number, index])
        return int(mixed.generate_state(1, np.uint64)[0] >> 1)

    def _step(self) -> None:
        """Step the engine. What fails has ended the requests whose fault it was.

        Raises:
            RuntimeError: if it can compute nothing any more; what had not ended before has no answer then.
        """
        try:
            self._engine.step()
        except Exception as error:
            LOG.exception("a step failed; its requests have ended")
            if not self._engine.is_healthy():
                raise RuntimeError(f"the engine can compute nothing any more: {error!r}") from error

    def _take(self, request: Request) -> list[dict[str, Any]]:
        """Take what an ended request gave; give the record of a line whose last it was."""
        assert request.result is not None
        row, answer, index = self._jobs.pop(request)
        answer.choices[index].take(request.result)
        if any(choice.output is None for choice in answer.choices):
            return []
        try:
            return [_record(row, answer.whole())]
        except ApiError as error:
            return [_record(row, error)]


def _record(row: Row, told: dict[str, Any] | ApiError | None, error: Any = None) -> dict[str, Any]:
    """Return a line of output."""
    response = None
    if isinstance(told, ApiError):
        response = {"status_code": told.status, "request_id": f"{ID}{row.number}", "body": told.body()}
    elif told is not None:
        response = {"status_code": 200, "request_id": told["id"], "body": told}
    return {"id": f"{ID}{row.number}", "custom_id": row.custom_id, "response": response, "error": error}


def _write(out: IO[bytes], records: list[dict[str, Any]]) -> None:
    """Have these on the disk."""
    out.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
    out.flush()
    os.fsync(out.fileno())


@contextmanager
def _opened(source: Path, target: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Both files; the target is this process's alone."""
    try:
        with source.open("rb") as rows, target.open("a+b") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"OUT={str(target)!r} is being written by another process") from None
            if os.path.samestat(os.fstat(rows.fileno()), os.fstat(out.fileno())):
                raise InputError(f"OUT={str(target)!r} is the file of the requests itself: name another")
            _sync_folder(target)
            yield rows, out
    except OSError as error:
        raise InputError(f"{error.filename or target}: {error.strerror or error}") from None


def _sync_folder(path: Path) -> None:
    """Have a new file's name on the disk too."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _rows(file: IO[bytes]) -> Iterator[Row]:
    """Every line that is not blank, from the first on."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            yield Row(number, line, _custom_id(line))


def _custom_id(line: bytes) -> str | None:
    try:
        found = parse(line).get("custom_id")
    except ApiError:
        return None
    return found if isinstance(found, str) else None


def _request(row: Row) -> tuple[dict[str, Any], bool]:
    """Return the body of a line's request, and whether it is a chat. Raises ApiError for what is none."""
    try:
        fields = parse(row.text)
    except ApiError as error:
        raise ApiError(400, f"line {row.number}: {error.message}") from None
    if row.custom_id is None:
        raise ApiError(400, f"line {row.number}: custom_id={shown(fields.get('custom_id'))} must be text")
    url, body = fields.get("url"), fields.get("body")
    if fields.get("method") != "POST" or not isinstance(url, str) or url not in URLS:
        what = f"method={shown(fields.get('method'))}, url={shown(url)}"
        raise ApiError(400, f"line {row.number}: {what} must be POST and one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ApiError(400, f"line {row.number}: body={shown(body)} must be an object")
    return body, URLS[url]


def _done(out: IO[bytes], target: Path) -> tuple[dict[int, str | None], int]:
    """Return the numbers of the lines that have an answer, with their custom ids; and how many bytes of the
    output are whole lines."""
    out.seek(0)
    done: dict[int, str | None] = {}
    whole = 0
    for line in out:
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            done[int(record["id"].removeprefix(ID))] = record["custom_id"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"OUT={str(target)!r} has lines that this did not write: name another") from None
        whole += len(line)
    return done, whole


def _check_same(rows: Iterable[Row], done: dict[int, str | None], source: Path, target: Path) -> int:
    """Return how many lines there are; raise InputError if what is done was done for other ones."""
    total, known = 0, dict(done)
    for row in rows:
        total += 1
        if row.number in known and known.pop(row.number) != row.custom_id:
            known = {row.number: None}
            break
    if known:
        problem = f"has an answer to line {min(known)} of another file than {str(source)!r}"
        raise InputError(f"OUT={str(target)!r} {problem}: name another OUT, or delete it")
    return total
