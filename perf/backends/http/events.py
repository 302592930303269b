"""Server-sent events: bytes as they came off a connection, cut into the data of each event.

The format is that of the HTML standard, section "Server-sent events": lines end in LF or CRLF, an empty one
ends an event, and lines that begin with a colon are comments. Fields other than `data` say nothing about a
reply, but for `error`, by which llama.cpp tells one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ERROR = "error"


def events(parts: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, str, str]]:
    """Yield each event: when its last byte came, `data` or `error`, and its text.

    Args:
        parts: what was read, and when, however the bytes were divided.

    A last event that the end of the stream cuts short is given too: whether it is whole, its reader sees.
    """
    at, rest = 0.0, b""
    data: list[bytes] = []
    for at, part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.strip(b"\r"):
                yield from _event(at, data)
                data = []
            elif line.startswith((b"data:", b"error:")):
                data.append(line.removesuffix(b"\r"))
    if rest.startswith((b"data:", b"error:")):
        data.append(rest.removesuffix(b"\r"))
    yield from _event(at, data)


def _event(at: float, lines: list[bytes]) -> Iterator[tuple[float, str, str]]:
    if not lines:
        return
    kind = ERROR if any(line.startswith(b"error:") for line in lines) else "data"
    values = (line.partition(b":")[2].removeprefix(b" ") for line in lines)
    yield at, kind, b"\n".join(values).decode("utf-8", errors="replace")
