"""`runtime chat`, against a real server over the engine without a model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from runtime.errors import ConfigError, TransientError, UnknownModelError
from runtime.serving.terminal import Conversation, connect, talk


@pytest.fixture
def client(start_server: Any) -> Iterator[httpx.Client]:
    """A client of a server with an adapter."""
    server = start_server(engine={"adapters": ["shop"], "context_tokens": 4096})
    with httpx.Client(base_url=server.url, timeout=60) as opened:
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
    assert "system message set" in text
    assert text.count("start a new conversation") == 2


def test_settings_go_along_and_wrong_ones_are_reported(client: httpx.Client) -> None:
    text = session(client, "/set max_tokens 2", "a b c d", "/set max_tokens", "/set seed x", "/set beams 2")
    assert "[2 tokens, " in text
    assert "max_tokens is the model's own" in text
    assert "seed is a number, not 'x'" in text
    assert "no setting 'beams'" in text


def test_two_models_answer_below_each_other_and_the_first_is_remembered(client: httpx.Client) -> None:
    conversation = connect(client)
    typed = iter(["/also nobody", "/also shop", "hello", "/also", "/quit"])
    written: list[str] = []
    talk(conversation, read=lambda: next(typed), write=written.append)
    text = "".join(written)
    assert "'nobody' is not served" in text
    assert text.index("[shop]\n") < text.index("[base]\n")
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
    assert "one answer again" in text


def test_refused_question_is_reported_and_the_conversation_goes_on(client: httpx.Client) -> None:
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


def test_a_pipe_asks_line_by_line_and_gets_the_answer_alone(start_server: Any) -> None:
    server = start_server(config={"api_key": "sesame"}, engine={"context_tokens": 4096})
    command = [sys.executable, "-m", "runtime", "chat", server.url.removeprefix("http://")]
    ran = subprocess.run(
        command,
        input="/set max_tokens 9\nhello\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "RUNTIME_API_KEY": "sesame"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "max_tokens is 9"
    assert "user" in ran.stdout
    assert "tokens," not in ran.stdout


def test_no_server_is_one_line_and_worth_a_retry() -> None:
    command = [sys.executable, "-m", "runtime", "chat", "http://127.0.0.1:9"]
    ran = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 75
    assert ran.stderr.startswith("error: no answer from http://127.0.0.1:9")


def answered_with(*events: str, **reply: Any) -> str:
    """Return what is written when another server answers "hello" with these events."""
    body = "".join(f"data: {event}\n\n" for event in events)
    transport = httpx.MockTransport(lambda _: httpx.Response(**{"status_code": 200, "text": body, **reply}))
    written: list[str] = []
    typed = iter(["hello", "/quit"])
    with httpx.Client(transport=transport, base_url="http://other") as client:
        conversation = Conversation(client, "m", ("m",))
        talk(conversation, read=lambda: next(typed), write=written.append, greet=False)
    return "".join(written)


def delta(text: str | None, **choice: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, **choice}]})


def test_other_servers_streams_are_read() -> None:
    """llama.cpp, vLLM and gateways leave fields out, or send null; some end without [DONE]."""
    begun = '{"choices":[{"index":0,"delta":{"role":"assistant","content":null},"finish_reason":null}]}'
    usage = '{"choices":[],"usage":{"completion_tokens":2},"timings":{"predicted_n":2}}'
    end = '{"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"usage":null}'
    assert answered_with(begun, delta("a"), delta("b"), end, usage, "[DONE]") == "ab\n"
    assert answered_with('{"object":"ping"}', '{"choices":null}', delta("ab"), end) == "ab\n"
    assert answered_with('{"choices":[{"delta":null}]}', delta("ab"), "[DONE]") == "ab\n"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ((delta("a"),), "ended the answer without saying why"),
        ((delta("a"), "{not json"), "no JSON object: {not json"),
        (("[" * 100_000,), "no JSON object: [["),
        (("[1]",), "no JSON object: [1]"),
        ((delta("a"), '{"error":{"message":"the \\u001b[31mengine\\nfailed"}}'), "[the engine failed]"),
        (('{"error":"overloaded"}',), "[overloaded]"),
        (('{"error":{"code":500}}',), "without saying which"),
        ((delta("x" * (9 << 20)),), "larger than"),
    ],
)
def test_a_broken_stream_is_one_line_and_the_conversation_goes_on(events: tuple[str, ...], said: str) -> None:
    assert said in answered_with(*events)


def test_nothing_of_the_server_controls_the_terminal() -> None:
    events = [delta("a\x1b"), delta("[2"), delta("Jb\x1b]0;title"), delta("\x07c\r\u202e"), "[DONE]"]
    assert answered_with(*events) == "abc\n"
    refusal = {"status_code": 400, "json": {"error": {"message": "no\x1b[2J \x9b31mway"}}}
    assert answered_with(text=None, **refusal) == "[http://other answers: no way]\n"


@pytest.mark.parametrize("listed", ["[]", "{}", '{"data":[{}]}', "<html>"])
def test_an_address_that_lists_no_models_is_refused(listed: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=listed))
    with (
        httpx.Client(transport=transport, base_url="http://other") as client,
        pytest.raises(ConfigError, match="is it the right address"),
    ):
        connect(client)
