"""`runtime chat`: a conversation in the terminal with a server of this kind, or any other OpenAI one.

Speaks HTTP only; does not know models or engines. Start at `talk`.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from runtime import net
from runtime.errors import ConfigError, TransientError, UnknownModelError, one_line
from runtime.serving.printable import Printable, printable

HELP = """\
/models            what is served
/model NAME        talk to this model from now on
/also NAME         ask this model too, shown first; /also alone ends that
/set NAME VALUE    a setting: temperature, top_p, top_k, max_tokens, seed …; without VALUE the model's own
/system TEXT       system message for the model
/new               start a new conversation
/quit              end (or Ctrl-D); Ctrl-C stops an answer"""

SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields of a request that `/set` changes."""


@dataclass(slots=True)
class Conversation:
    """One conversation: its turns, and the models that answer."""

    client: httpx.Client
    model: str
    models: tuple[str, ...]
    also: str | None = None
    """A second model that gets the same questions, with the history of the first."""
    system: str = ""
    settings: dict[str, float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    new_tokens: int = 0
    """Tokens of the last answer, as the server counted them."""

    def ask(self, question: str, *, model: str | None = None) -> Iterator[str]:
        """Yield the answer to `question` in chunks, and add both to the turns once it is complete.

        A caller that stops early keeps the chunks so far. An answer of another `model` is not added. Raises
        TransientError when the server does not answer or gives up.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        user_turn = {"role": "user", "content": question}
        body = {
            **self.settings,
            "model": model or self.model,
            "messages": [*system, *self.turns, user_turn],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = ""
        self.new_tokens = 0
        try:
            for event in _events(self.client, body):
                self.new_tokens = _completion_tokens(event) or self.new_tokens
                if chunk := _text(event):
                    text += chunk
                    yield chunk
        finally:
            if text and model is None:
                self.turns += [user_turn, {"role": "assistant", "content": text}]


def connect(client: httpx.Client, model: str | None = None) -> Conversation:
    """Return a conversation with `model`, or with the first one that the server lists.

    Raises UnknownModelError for a model that is not served, ConfigError for a wrong key, TransientError
    when there is no server or it is not ready.
    """
    try:
        reply = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise TransientError(f"no answer from {client.base_url}: {error}; does a server run there?") from None
    _check(reply, str(client.base_url))
    try:
        models = tuple(printable(str(entry["id"])) for entry in reply.json()["data"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{client.base_url} lists no models as OpenAI does: is it the right address?"
        ) from None
    if not models:
        raise TransientError(f"{client.base_url} serves no model")
    if model is not None and model not in models:
        raise UnknownModelError(
            f"model '{model}' is not served at {client.base_url}: {', '.join(models)} are"
        )
    return Conversation(client, model or models[0], models)


def talk(
    conversation: Conversation,
    *,
    read: Callable[[], str],
    write: Callable[[str], None],
    greet: bool = True,
) -> None:
    """Read questions and write answers until `read` raises EOFError or the user leaves.

    An interrupt (Ctrl-C) ends the current answer, not the conversation. `greet` writes the model and the
    commands, and after each answer its speed. Nothing that comes from the server controls the terminal.
    """
    if greet:
        write(f"{conversation.model} at {conversation.client.base_url}\n{HELP}\n")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt: a new line, as shells do
            write("\n")
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            write(_command(conversation, line) + "\n")
        elif line:
            if conversation.also is not None:
                # answers first: its answer is not added to the turns, so both see the same history
                write(f"[{conversation.also}]\n")
                _answer(conversation, conversation.ask(line, model=conversation.also), write, rate=greet)
                write(f"[{conversation.model}]\n")
            _answer(conversation, conversation.ask(line), write, rate=greet)


def _answer(
    conversation: Conversation, chunks: Iterator[str], write: Callable[[str], None], *, rate: bool
) -> None:
    first: float | None = None
    terminal = Printable()
    try:
        for chunk in chunks:
            first = first or time.monotonic()
            write(terminal.feed(chunk))
    except KeyboardInterrupt:
        write(" [stopped]")
    except TransientError as failure:
        write(f"[{failure}]")
    if rate and first is not None and conversation.new_tokens > 1:
        seconds = max(time.monotonic() - first, 1e-6)
        write(f"\n[{conversation.new_tokens} tokens, {(conversation.new_tokens - 1) / seconds:.1f}/s]")
    write("\n")


def _command(conversation: Conversation, line: str) -> str:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/models":
        return ", ".join(conversation.models)
    if name in {"/model", "/also"} and rest not in (*conversation.models, "" if name == "/also" else None):
        return f"'{rest}' is not served; {', '.join(conversation.models)} are"
    if name == "/model":
        conversation.model = rest
        return f"now {rest}"
    if name == "/also":
        conversation.also = rest or None
        return f"and {rest} too" if rest else "one answer again"
    if name == "/set":
        return _set(conversation, *rest.partition(" ")[::2])
    if name == "/system":
        conversation.system = rest
        return "system message set" if rest else "no system message"
    if name == "/new":
        conversation.turns.clear()
        return "new conversation"
    return HELP


def _set(conversation: Conversation, name: str, value: str) -> str:
    if name not in SETTINGS:
        return f"no setting '{name}'; there are {', '.join(SETTINGS)}"
    if not value:
        conversation.settings.pop(name, None)
        return f"{name} is the model's own"
    try:
        number = float(value)
    except ValueError:
        return f"{name} is a number, not '{value}'"
    conversation.settings[name] = int(number) if number.is_integer() else number
    return f"{name} is {conversation.settings[name]}"


def _events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a streamed chat completion; TransientError for whatever ends it early."""
    complete = False
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.is_error:
                reply.read()
            _check(reply, str(client.base_url))
            for data in net.events(reply.iter_bytes()):
                if data.startswith("[DONE]"):
                    complete = True
                    continue
                event = _chunk(data)
                complete = complete or any(choice.get("finish_reason") for choice in _choices(event))
                yield event
    except httpx.HTTPError as error:
        raise TransientError(f"the connection to {client.base_url} broke: {error}") from None
    if not complete:
        raise TransientError(f"{client.base_url} ended the answer without saying why; it may be incomplete")


def _chunk(data: str) -> dict[str, Any]:
    """Return one event's JSON object; TransientError for an error that it reports, or for anything else."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise TransientError(
            f"the server sent an event that is no JSON object: {one_line(printable(data), 80)}"
        )
    if event.get("error"):
        raise TransientError(_message(event) or "the server reports an error without saying which")
    return event


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a chunk's choices; servers leave them out, null or empty in chunks that carry something else."""
    choices = event.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _text(event: dict[str, Any]) -> str:
    """Return what a chunk adds to the answer, "" where it adds nothing."""
    deltas = [choice.get("delta") for choice in _choices(event)]
    contents = [delta.get("content") for delta in deltas if isinstance(delta, dict)]
    return "".join(content for content in contents if isinstance(content, str))


def _completion_tokens(event: dict[str, Any]) -> int:
    usage = event.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def _message(body: Any) -> str:
    """Return the message of an error body in one printable line: OpenAI's shape, or one of its variants."""
    error = body.get("error") if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    if said is None and isinstance(body, dict):
        said = body.get("message") or body.get("detail")
    return one_line(printable(str(said))) if said else ""


def _check(reply: httpx.Response, url: str) -> None:
    if reply.status_code == 401:
        raise ConfigError(f"{url} wants another API key")
    if reply.is_error:
        try:
            message = _message(reply.json())
        except (ValueError, RecursionError):
            message = ""
        raise TransientError(f"{url} answers: {message or f'status {reply.status_code}'}")
