"""Responses that are not streamed."""

from __future__ import annotations

import json

from starlette.responses import Response

from engine.openai_api.api_error import ApiError


def json_response(told: object) -> Response:
    """Return what is told, with status 200."""
    return Response(json.dumps(told), media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as OpenAI's API tells it."""
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")
