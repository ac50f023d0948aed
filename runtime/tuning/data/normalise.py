"""A row of any common shape becomes an example: a list of messages with its tools, or plain text.

Takes the columns that columns.py finds and reads what they hold. Does not know file formats, tokens or
templates. Start at `RowNormaliser.example`.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from runtime.errors import DataError
from runtime.tuning.data import calls, cells, columns, conversation, literals, shapes
from runtime.tuning.data.columns import Cells, Columns
from runtime.tuning.data.content import content
from runtime.tuning.data.conversation import RowConversation
from runtime.tuning.data.example import SPEAKERS, Example
from runtime.tuning.settings import DataSource

PLACEHOLDERS = ("<image>", "<audio>", "<video>")
"""Where data of models that see and hear refers to the files beside a conversation."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What the rows of a data set were made of."""

    columns: Mapping[Columns, int] = field(default_factory=dict)
    """Rows by their columns, most first."""
    unused: tuple[str, ...] = ()
    """Columns that no row was made of although some hold something, as far as is known."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of messages that are not used, such as time stamps."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Rows by what was done with them that the user should know."""


class RowNormaliser:
    """Makes examples of the rows of one job, and counts what it made them of."""

    def __init__(self, source: DataSource):
        self._source = source
        self._columns: Counter[Columns] = Counter()
        self._notes: Counter[str] = Counter()
        self._names: dict[str, None] = {}
        self._wrappers: set[str] = set()
        self._full: set[str] = set()
        self._empty: set[str] = set()
        self._ignored: set[str] = set()

    def facts(self) -> RowFacts:
        """Return what the rows so far were made of."""
        taken = {name for found in self._columns for name in found.names()}
        taken |= self._wrappers | (self._empty - self._full)
        return RowFacts(
            dict(self._columns.most_common()),
            tuple(name for name in self._names if name not in taken),
            tuple(sorted(self._ignored)),
            dict(self._notes.most_common()),
        )

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Return `row` as an example; DataError, beginning with `where`, naming the column at fault."""
        self._names |= dict.fromkeys(map(str, row))
        named = Cells(row)
        found = columns.find(named, self._source, where)
        if found is None:
            return self._within(row, where)
        if _wraps_messages(row, found):
            inside = {name: value for name, value in row.items() if name != found.messages}
            self._wrappers.add(found.messages)
            return self.example(inside | row[found.messages], _at(where, found.messages))
        if not self._source.response_column:
            _check_beside(named, found, where)
            _check_choices(named, found, where)
        if not self._source.response_column and not self._source.messages_column:
            _check_mark(named, found, where)
        if found.text:
            text = cells.filled_text(row[found.text], _at(where, found.text))
            self._columns[found] += 1
            return Example((), text=text, origin=where)
        messages, found = _messages(named, found, where)
        found = _with_columns_beside(named, found)
        self._full |= named.full
        self._empty |= named.empty
        talk = _talk(row, messages, found, where=where)
        tools = calls.tools(row[found.tools], _at(where, found.tools)) if found.tools else ()
        self._count(found, talk)
        return Example(
            tuple(talk.messages), origin=where, tools=tools + talk.tools, untrained=frozenset(talk.untrained)
        )

    def _within(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example of a row that is wrapped in another; DataError where none is."""
        inner = _wrapper(row)
        if inner and columns.find(Cells(row[inner]), self._source, _at(where, inner)):
            self._wrappers.add(inner)
            return self.example(row[inner], _at(where, inner))
        raise DataError(
            f"{where}: no known columns (has {', '.join(map(str, row)) or 'none'}); {columns.accepted()}"
        )

    def _count(self, found: Columns, talk: RowConversation) -> None:
        self._columns[found] += 1
        self._ignored |= talk.ignored
        if shapes.CHOSEN in (found.answer.lower(), found.messages.lower()):
            talk.notes.add("preference data: the chosen answer is trained on, the rejected one is not used")
        self._notes.update(talk.notes)


def _wraps_messages(row: Mapping[str, Any], found: Columns) -> bool:
    """Return whether the column of messages holds an object with a column of them."""
    inner = row[found.messages] if found.messages else None
    return (
        isinstance(inner, dict)
        and not conversation.is_messages(inner)
        and any(name in shapes.MESSAGES and isinstance(value, list) for name, value in inner.items())
    )


def _wrapper(row: Mapping[str, Any]) -> str:
    """Return the column that holds the row itself, "" for none: the only one, or one known by its name."""
    named = Cells(row)
    known = [named.name(name) for name in shapes.WRAPPERS]
    if any(map(named.filled, shapes.ANNOTATED)):
        known = []
    names = list(row) if len(row) == 1 else known
    return next((name for name in names if name is not None and isinstance(row[name], Mapping)), "")


def _at(where: str, name: str) -> str:
    return f"{where} column '{name}'"


def _check_beside(row: Cells, found: Columns, where: str) -> None:
    """Raise DataError for columns beside those of a shape that say what is not done here."""
    for name in filter(None, map(row.filled, shapes.REFUSED)):
        raise DataError(f"{where} has column '{name}', which is not supported; leave it out")
    media = next(
        (name for name in map(row.filled, shapes.MEDIA) if name and _is_medium(row, name, found)), None
    )
    if media:
        raise DataError(f"{where} has column '{media}': only text is trained on; leave it out to do so")
    speaker = next((str(row.value(name)) for name in SPEAKERS if row.filled(name)), "")
    if found.text and speaker.lower() in conversation.ROLES:
        raise DataError(
            f"{where} is one message (of {speaker!r}); a row is expected to hold a whole conversation, "
            "as a list in a column 'messages'"
        )


def _check_mark(row: Cells, found: Columns, where: str) -> None:
    """Raise DataError for an answer that a column marks as bad."""
    marks = (name for name in map(row.filled, shapes.MARKS) if name)
    mark = next((name for name in marks if str(row.row[name]).strip().lower() in shapes.BAD), None)
    if not found.text and mark and mark not in found.names():
        way = f"messages_column {found.messages}" if found.messages else f"response_column {found.answer}"
        raise DataError(
            f"{where} has {mark} {str(row.row[mark]).strip().lower()}, which marks a bad answer: answers are "
            f"trained on, never against; leave such rows out (--on-bad-row skip does), or "
            f"set {way} to take all"
        )


def _check_choices(row: Cells, found: Columns, where: str) -> None:
    """Raise DataError for a question that refers to columns which would not be in it."""
    if not found.question or not found.answer:
        return
    choices = row.first_filled(shapes.CHOICES)
    if not choices and all(map(row.filled, shapes.LETTERS)):
        choices = row.first_filled(shapes.LETTERS)
    if choices and choices not in found.names():
        raise DataError(
            f"{where} has column '{choices}', which the question '{found.question[0]}' refers to: write the "
            f"choices into it and the right one into '{found.answer}', or set context_column "
            f"{found.question[0]} and response_column {found.answer} to train without them"
        )


def _is_medium(row: Cells, name: str, found: Columns) -> bool:
    """Return whether a column holds what a conversation refers to, rather than an address for people."""
    if isinstance(row.value(name), list | Mapping | bytes):
        return True
    texts = [str(row.row[column]) for column in found.names()]
    return any(placeholder in text for text in texts for placeholder in PLACEHOLDERS)


def _messages(row: Cells, found: Columns, where: str) -> tuple[RowConversation | None, Columns]:
    """Return the messages of a row, None for a pair; and the columns with that of an answer they await."""
    if not found.messages:
        return None, found
    at = _at(where, found.messages)
    beside = row.first_filled(name for name in shapes.ANSWERS if name != found.messages)
    if found.messages.lower() == shapes.CHOSEN:
        return _chosen(row, found.messages, at), found
    talk = conversation.read(row.row[found.messages], at, answer=beside)
    return talk, replace(found, answer=beside if talk.awaits_answer else "")


def _chosen(row: Cells, name: str, where: str) -> RowConversation:
    """Return the conversation that is the better of two; it is trained from where the other one differs."""
    value = row.row[name]
    talk = conversation.read_transcript(value) if isinstance(value, str) else None
    if talk is None and isinstance(value, str) and literals.parse_container(value) is value:
        raise DataError(
            f"{where} is a text beside no question, expected a column 'prompt' (or context_column), a list "
            "of messages, or a text with 'Human:' and 'Assistant:' before each turn"
        )
    talk = talk or conversation.read(value, where)
    return talk.answered_from(_difference(talk, row.value(shapes.REJECTED)))


def _difference(chosen: RowConversation, rejected: Any) -> int:
    """Return where the answer in `chosen` begins: where `rejected`, a conversation too, differs from it.

    Behind the last question where they do not begin alike, or do not differ.
    """
    other: RowConversation | None = None
    with contextlib.suppress(DataError):  # it is not trained on, and so may be anything
        other = conversation.read_transcript(rejected) if isinstance(rejected, str) else None
        other = other or conversation.read(rejected, "")
    pairs = zip(chosen.messages, other.messages if other else (), strict=False)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if alike and any(message["role"] == "assistant" for message in chosen.messages[alike:]):
        return alike
    questions = [at for at, message in enumerate(chosen.messages) if message["role"] == "user"]
    return questions[-1] + 1 if questions else 0


def _with_columns_beside(row: Cells, found: Columns) -> Columns:
    """Return the columns of a conversation with those that add to it."""
    history = row.first_filled(shapes.HISTORY)
    return replace(
        found,
        system=row.first_filled(shapes.SYSTEM),
        history=history if history and conversation.is_history(row.row[history]) else "",
        tools=row.first_filled(shapes.TOOLS),
        reasoning=row.first_filled(filter(row.holds_text, shapes.REASONING)) if found.answer else "",
    )


def _talk(
    row: Mapping[str, Any], messages: RowConversation | None, found: Columns, *, where: str
) -> RowConversation:
    """Return the whole conversation of a row; DataError when there is nothing in it to learn.

    `messages` are those that the row holds as such.
    """
    at = _at(where, found.messages or found.answer)
    talk = _pair(row, found, where) if messages is None else messages
    if messages is not None and found.answer:
        talk = _answered(messages, row, found, where)
    if found.history:
        talk = conversation.read_history(row[found.history], _at(where, found.history)).followed_by(talk)
    if found.system:
        talk = _with_system(talk, row[found.system], _at(where, found.system))
    answers = {index for index, message in enumerate(talk.messages) if message["role"] == "assistant"}
    if not answers:
        raise DataError(f"{at} has no assistant message, so there is nothing to learn")
    if answers <= talk.untrained:
        raise DataError(
            f"{at} excludes all its assistant messages from training, so there is nothing to learn"
        )
    return talk


def _with_system(talk: RowConversation, value: Any, where: str) -> RowConversation:
    if isinstance(value, Mapping) and "parts" in value:
        value = value["parts"]
    text = content(value, "system", where).text
    first = talk.messages[0] if talk.messages else {"role": "user"}
    if first["role"] in ("system", "developer"):
        if first["content"].strip() != text.strip():
            raise DataError(f"{where} and the first message are two different system messages, expected one")
        return talk
    return RowConversation([{"role": "system", "content": text}]).followed_by(talk)


def _pair(row: Mapping[str, Any], found: Columns, where: str) -> RowConversation:
    """Return a question and its answer; either may already be a list of messages."""
    first, *under = found.question
    if conversation.is_messages(row[first]):
        if under:
            raise DataError(
                f"{_at(where, under[0])} stands beside a list of messages, expected it within them"
            )
        asked = conversation.read(row[first], _at(where, first)).as_context()
        return _answered(asked, row, found, where)
    texts = [cells.filled_text(row[name], _at(where, name)) for name in found.question]
    asked = RowConversation([{"role": "user", "content": "\n\n".join(texts)}])
    talk = _answered(asked, row, found, where)
    if any(conversation.is_text_of_messages(row[name]) for name in (*found.question, found.answer)):
        talk.notes.add(
            "a question or an answer that is the text of a list of messages was taken as text; "
            "in JSON lines or Parquet it would be messages"
        )
    return talk


def _answered(asked: RowConversation, row: Mapping[str, Any], found: Columns, where: str) -> RowConversation:
    """Return what was asked with its answer; earlier answers are not trained on before a chosen one."""
    answer = _answer(row, found, where)
    chosen = found.answer.lower() == shapes.CHOSEN
    if chosen:
        asked = asked.as_context()
    if answer.messages[0]["role"] not in ("system", "user"):
        return asked.followed_by(answer)
    size = len(asked.messages)  # preference data repeats the question
    if answer.messages[:size] == asked.messages:
        answer = replace(
            answer, untrained=answer.untrained | asked.untrained, notes=answer.notes | asked.notes
        )
    if chosen:
        return answer.answered_from(_difference(answer, Cells(row).value(shapes.REJECTED)))
    return answer


def _answer(row: Mapping[str, Any], found: Columns, where: str) -> RowConversation:
    value, at = row[found.answer], _at(where, found.answer)
    talk = RowConversation()
    if conversation.is_messages(value):
        talk = conversation.read(value, at)
    elif found.tools and calls.looks_like_calls(value):
        turn = {"role": "assistant", "content": "", "tool_calls": value}
        talk = conversation.read([turn], at)
    else:
        if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # SQuAD's alternatives
            value = value["text"][:1]
        text = cells.filled_text(value, at) if value != [] else ""
        if not text:
            raise DataError(f"{at} is empty")
        talk = RowConversation([{"role": "assistant", "content": text}])
    thoughts = (
        conversation.thoughts_in(row[found.reasoning], _at(where, found.reasoning)) if found.reasoning else ""
    )
    if thoughts.strip():
        talk.messages[-1].setdefault("reasoning_content", thoughts)
    return talk
