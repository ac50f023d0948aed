"""`runtime chat`: a conversation in the terminal with a server of this kind, or any other OpenAI one.

Speaks HTTP only; does not know models or engines. Start at `talk`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from runtime.errors import ConfigError, TransientError, UnknownModelError

HELP = (
    "/model NAME changes the model, /models lists them, /system TEXT sets the rules, /new forgets, /quit ends"
)


@dataclass(slots=True)
class Conversation:
    """One conversation: what was said, and with whom."""

    client: httpx.Client
    model: str
    models: tuple[str, ...]
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer to `question` in pieces, and remember both once it is complete.

        A caller that stops early keeps what came. Raises TransientError when the server does not answer
        or gives up.
        """
        rules = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        body = {"model": self.model, "messages": [*rules, *self.turns, asked], "stream": True}
        text = ""
        try:
            for piece in _pieces(self.client, body):
                text += piece
                yield piece
        finally:
            if text:
                self.turns += [asked, {"role": "assistant", "content": text}]


def connect(client: httpx.Client, model: str | None = None) -> Conversation:
    """Return a conversation with `model`, or with the first one the server has.

    Raises UnknownModelError for a model that is not there, ConfigError for a wrong key, TransientError
    when there is no server or it is not ready.
    """
    try:
        reply = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise TransientError(
            f"no answer from {client.base_url}: {error}; does a server run there?"
        ) from None
    _check(reply, str(client.base_url))
    models = tuple(entry["id"] for entry in reply.json()["data"])
    if model is not None and model not in models:
        raise UnknownModelError(
            f"model '{model}' is not served at {client.base_url}: {', '.join(models)} are"
        )
    return Conversation(client, model or models[0], models)


def talk(conversation: Conversation, *, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Read questions and write answers until `read` raises EOFError or the user leaves.

    An interrupt (Ctrl-C) ends the answer under way, not the conversation.
    """
    write(f"{conversation.model} at {conversation.client.base_url}. {HELP}\n")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            write(_command(conversation, line) + "\n")
        elif line:
            _answer(conversation, line, write)


def _answer(conversation: Conversation, line: str, write: Callable[[str], None]) -> None:
    pieces = conversation.ask(line)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        write(" [stopped]")
    except TransientError as failure:
        write(f"[{failure}]")
    write("\n")


def _command(conversation: Conversation, line: str) -> str:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/models":
        return ", ".join(conversation.models)
    if name == "/model" and rest in conversation.models:
        conversation.model = rest
        return f"now {rest}"
    if name == "/model":
        return f"'{rest}' is not served; {', '.join(conversation.models)} are"
    if name == "/system":
        conversation.system = rest
        return "rules set" if rest else "no rules"
    if name == "/new":
        conversation.turns.clear()
        return "forgotten"
    return HELP


def _pieces(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                reply.read()
            _check(reply, str(client.base_url))
            for line in reply.iter_lines():
                data = line.removeprefix("data: ")
                if data in {line, "[DONE]"}:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise TransientError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise TransientError(f"the connection to {client.base_url} broke: {error}") from None


def _check(reply: httpx.Response, url: str) -> None:
    if reply.status_code == 401:
        raise ConfigError(f"{url} wants another API key")
    if reply.is_error:
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {reply.status_code}"
        raise TransientError(f"{url} answers: {message}")
