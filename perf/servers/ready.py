"""Whether a server takes requests: `/health` where there is one, else `/v1/models`, else it is tried.

A server that loads answers 503, or does not listen yet. Ray Serve's proxies listen before there is an
application, and know their own `/-/healthz` alone then.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from perf.errors import GateError
from perf.servers.target import KEY, Target

POLL_S = 0.2
ANSWER_S = 10.0  # within which a server that is there answers
PATHS = ("/health", "/v1/models", "/-/healthz")
ABSENT = frozenset({404, 405, 501})
NOT_YET = 503


class TargetError(GateError):
    """The server is not there, or cannot do what is asked of it."""


def wait_until_ready(target: Target, limit_s: float, alive: Callable[[], None] | None = None) -> None:
    """Wait until a server takes requests.

    Args:
        target: where it is.
        limit_s: seconds.
        alive: raises if the server that was started has ended; None for one of the user's own, which must
            be listening already.

    Raises:
        TargetError: if it is not ready in time, is not there, or refuses the key.
    """
    until = time.monotonic() + limit_s
    while True:
        if alive is not None:
            alive()
        try:
            if _is_ready(target):
                return
            why = "says that it is not ready (HTTP 503)"
        except OSError as error:
            why = f"does not answer: {error}"
            if alive is None:
                raise TargetError(f"{target.url} {why}; start it first, or name its address") from None
        if time.monotonic() > until:
            raise TargetError(f"{target.url} {why}, {limit_s:.0f} s after it was started")
        time.sleep(POLL_S)


def _is_ready(target: Target) -> bool:
    """Return whether it takes requests. Raises OSError if nothing answers, TargetError if it never will."""
    for path in PATHS:
        status = _status(target, path)
        if status == NOT_YET:
            return False
        if status not in ABSENT:
            return _taken(target, path, status)
    return True  # it says nothing of itself: the first request shows


def _taken(target: Target, path: str, status: int) -> bool:
    if status in (401, 403):
        raise TargetError(f"{target.url} answers {path} with HTTP {status}: give its key in ${KEY}")
    if status != 200:
        raise TargetError(f"{target.url} answers {path} with HTTP {status}, not 200")
    return True


def _status(target: Target, path: str) -> int:
    request = urllib.request.Request(target.at(path))
    if target.key:
        request.add_header("Authorization", f"Bearer {target.key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ANSWER_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except urllib.error.URLError as error:
        raise OSError(error.reason if isinstance(error.reason, str) else str(error.reason)) from None
    except http.client.HTTPException as error:
        raise OSError(f"it speaks no HTTP: {error!r}") from None
