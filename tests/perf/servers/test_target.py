"""How a server is named."""

from __future__ import annotations

import pytest

from engine import InputError
from perf.servers.target import KEY, Target


@pytest.mark.parametrize(
    "url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/", " http://h:8000/v1 "]
)
def test_an_address_with_or_without_v1(url: str) -> None:
    assert Target.parse(url).at("/v1/models") == "http://h:8000/v1/models"


def test_a_path_before_v1_and_a_query_are_kept_for_requests() -> None:
    target = Target.parse("https://h/openai/v1?version=2", "m", "chat")
    assert target.at("/v1/models") == "https://h/openai/v1/models?version=2"
    assert (target.url, target.model, target.api) == ("https://h/openai", "m", "chat")


@pytest.mark.parametrize(
    "url", ["", "h:8000", "ftp://h", "http://", "http://h:99999", "http://h:x", "http:///v1"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match=r"target=.* must be the address of a server"):
        Target.parse(url)


def test_a_password_has_no_place_in_an_address() -> None:
    with pytest.raises(InputError, match=f"give the key in .{KEY}") as error:
        Target.parse("http://user:secret@h:8000")
    assert "secret" not in str(error.value)


def test_an_api_that_is_none() -> None:
    with pytest.raises(InputError, match="api='text' must be one of chat, completions"):
        Target.parse("http://h", api="text")


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert Target.parse("http://h").key is None
    monkeypatch.setenv(KEY, "s")
    assert Target.parse("http://h").key == "s"
