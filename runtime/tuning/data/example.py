"""One training row as the rest of tuning knows it: a conversation as chat templates know one, or plain text.

Knows neither files, nor columns, nor tokens. `normalise.py` makes examples of rows.
"""

from dataclasses import dataclass
from typing import Any

SPEAKERS = ("role", "from", "speaker")
"""Names of the field, or the column, that says whose a message is, in lower case."""

Message = dict[str, Any]
"""One turn: role and content, and where the row has them tool_calls (OpenAI's shape, `arguments` an object),
tool_call_id, name, reasoning_content. Beside calls the content may be "" or None."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: a conversation, or plain text when `messages` is empty."""

    messages: tuple[Message, ...]
    """Turns in their order."""
    text: str = ""
    """Text of which every token is labelled, for rows that are no conversation."""
    origin: str = ""
    """File and row, for error messages."""
    tools: tuple[dict[str, Any], ...] = ()
    """The functions that the assistant may call, as OpenAI describes tools."""
    untrained: frozenset[int] = frozenset()
    """Indexes of assistant messages that are not labelled, because the row says so."""

    def roles(self) -> set[str]:
        """Return who speaks in the conversation."""
        return {message["role"] for message in self.messages}
