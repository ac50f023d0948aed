"""`runtime chat`, against a real server over the engine without a model."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from runtime.errors import ConfigError, TransientError, UnknownModelError
from runtime.serving.terminal import connect, talk


@pytest.fixture
def client(start_server: Any) -> Iterator[httpx.Client]:
    """A client of a server with an adapter."""
    server = start_server(engine={"adapters": ["shop"], "context_tokens": 4096})
    with httpx.Client(base_url=server.url, timeout=10) as opened:
        yield opened


def session(client: httpx.Client, *lines: str) -> str:
    """Return what is written when `lines` are typed."""
    written: list[str] = []
    typed = iter(lines)

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk(connect(client), read=read, write=written.append)
    return "".join(written)


def test_question_is_answered_and_remembered(client: httpx.Client) -> None:
    conversation = connect(client)
    assert "user\nhello" in "".join(conversation.ask("hello"))
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_commands_change_model_and_rules(client: httpx.Client) -> None:
    text = session(
        client, "/models", "/model shop", "/model nobody", "/system be brief", "/what", "/quit", "no"
    )
    assert "base, shop" in text
    assert "now shop" in text
    assert "'nobody' is not served" in text
    assert "rules set" in text
    assert text.count("/quit ends") == 2


def test_refused_question_is_said_and_the_conversation_goes_on(client: httpx.Client) -> None:
    text = session(client, "x " * 5000, "hello")
    assert "4096" in text
    assert "user\nhello" in text


def test_interrupt_ends_the_answer_only(client: httpx.Client) -> None:
    written: list[str] = []
    typed = iter(["hello", "/quit"])

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 4:
            raise KeyboardInterrupt

    conversation = connect(client)
    talk(conversation, read=lambda: next(typed), write=write)
    assert " [stopped]" in written
    assert len(conversation.turns) == 2


def test_unknown_model_wrong_key_and_no_server_are_one_line(client: httpx.Client, start_server: Any) -> None:
    with pytest.raises(UnknownModelError, match="base, shop are"):
        connect(client, "nobody")
    locked = start_server(config={"api_key": "sesame"})
    with httpx.Client(base_url=locked.url) as other, pytest.raises(ConfigError, match="API key"):
        connect(other)
    locked.stop()
    with (
        httpx.Client(base_url=locked.url) as other,
        pytest.raises(TransientError, match="does a server run"),
    ):
        connect(other)
