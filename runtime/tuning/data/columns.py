"""Which columns of a row hold what: the choice among the shapes that data has (shapes.py).

Null is absent, so tables that are the union of several shapes are read row by row. Knows names, not what
cells mean. Start at `find`; `accepted` is the sentence for errors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import DataError
from runtime.tuning.data import cells
from runtime.tuning.data.shapes import ANSWERS, CHOSEN, LABELS, MESSAGES, PAIRS, TEXT, PairShape
from runtime.tuning.settings import DataSource

_SHAPES = {*MESSAGES, TEXT, CHOSEN} | {
    name for pair in PAIRS for name in (pair.question, *pair.contexts, *pair.answers)
}


def accepted() -> str:
    """Return every shape of a row that is read, for error messages."""
    pairs = ", ".join(f"{pair.question}/{'|'.join(pair.answers)}" for pair in PAIRS)
    return (
        f"expected {'|'.join(MESSAGES)}, {pairs} or {TEXT}; or set messages_column, "
        "or context_column and response_column"
    )


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that one row is made of, by their names in the file; "" and () for none."""

    messages: str = ""
    question: tuple[str, ...] = ()
    """The prompt, and what is put under it."""
    answer: str = ""
    text: str = ""
    system: str = ""
    history: str = ""
    tools: str = ""
    reasoning: str = ""

    def __str__(self) -> str:
        named = {
            "messages": self.messages,
            "question": " + ".join(self.question),
            "answer": self.answer,
            "plain text": self.text,
            "system": self.system,
            "history": self.history,
            "tools": self.tools,
            "reasoning": self.reasoning,
        }
        return ", ".join(f"{what} from {name}" for what, name in named.items() if name)

    def names(self) -> set[str]:
        """Return all of them."""
        beside = (
            self.messages,
            self.answer,
            self.text,
            self.system,
            self.history,
            self.tools,
            self.reasoning,
        )
        return {name for name in (*beside, *self.question) if name}


class Cells:
    """A row by the lower-case names of its columns."""

    def __init__(self, row: Mapping[str, Any]):
        self.row = row
        self.full: set[str] = set()
        """Columns that were asked for and say something."""
        self.empty: set[str] = set()
        """Those that say nothing."""
        self._names: dict[str, str] = {}
        for name in row:
            lowered = str(name).strip().lower()
            if lowered not in self._names or name == lowered:
                self._names[lowered] = name

    def name(self, wanted: str) -> str | None:
        """Return the row's own name of a column, None when there is none."""
        return wanted if wanted in self.row else self._names.get(wanted.lower())

    def value(self, wanted: str) -> Any:
        """Return the cell of a column, None when there is none."""
        return self.row.get(self.name(wanted) or "")

    def filled(self, wanted: str) -> str | None:
        """Return the row's own name of a column whose cell says something, else None."""
        name = self.name(wanted)
        if name is None:
            return None
        said = cells.filled(self.row[name])
        (self.full if said else self.empty).add(name)
        return name if said else None

    def holds_text(self, wanted: str) -> bool:
        """Return whether a column holds text or parts of it, rather than a switch or a number."""
        return isinstance(self.value(wanted), str | list | Mapping)

    def first_filled(self, wanted: Iterable[str]) -> str:
        """Return the name of the first column of `wanted` whose cell says something, "" for none."""
        return next((name for name in map(self.filled, wanted) if name is not None), "")

    def first(self, wanted: Iterable[str]) -> str:
        """Return the name of the first column of `wanted` that there is, "" for none."""
        return next((name for name in map(self.name, wanted) if name is not None), "")


def find(row: Cells, source: DataSource, where: str) -> Columns | None:
    """Return the columns that `row` is made of, None when no column of it is known.

    DataError, beginning with `where`, for a column that is set and not there, and where those that are
    there are empty.
    """
    found = _set(row, source, where) or _messages(row) or _pair(row, where) or _text(row, where)
    known = [name for name in row.row if str(name).strip().lower() in _SHAPES] if found is None else []
    if known and not any(cells.filled(row.row[name]) for name in known):
        are = "columns {} are empty" if len(known) > 1 else "column {} is empty"
        raise DataError(f"{where} {are.format(', '.join(map(repr, known)))}")
    return found


def _set(row: Cells, source: DataSource, where: str) -> Columns | None:
    """Return the columns that settings name, the other half of a pair as it is found."""
    if source.messages_column:
        return Columns(messages=_required(row, source.messages_column, where, "messages_column"))
    prompt, answer = source.context_column, source.response_column
    if not prompt and not answer:
        return None
    if answer and not prompt:
        name = _required(row, answer, where, "response_column")
        pair = next((p for p in PAIRS if p.question != answer.lower() and row.filled(p.question)), None)
        asked = _question(row, pair) if pair else ()
        return Columns(question=asked, answer=name) if asked else Columns(text=name)
    asked = (_required(row, prompt or "", where, "context_column"),)
    if answer:
        return Columns(question=asked, answer=_required(row, answer, where, "response_column"))
    found = row.first_filled(name for pair in PAIRS for name in pair.answers)
    if not found:
        raise DataError(f"{where}: no column with an answer beside '{asked[0]}'; set response_column")
    return Columns(question=asked, answer=found)


def _required(row: Cells, wanted: str, where: str, setting: str) -> str:
    name = row.name(wanted)
    if name is None:
        raise DataError(f"{where}: no column '{wanted}' ({setting}; has {', '.join(map(str, row.row))})")
    if not cells.filled(row.row[name]):
        raise DataError(f"{where} column '{name}' is empty")
    return name


def _messages(row: Cells) -> Columns | None:
    name = row.first_filled(MESSAGES)
    if not name and (chosen := row.filled(CHOSEN)):
        name = "" if row.first_filled(pair.question for pair in PAIRS) else chosen
    return Columns(messages=name) if name else None


def _pair(row: Cells, where: str) -> Columns | None:
    """Return the first pair of which both halves are filled.

    DataError for a question without an answer: what else the row holds is not what was meant. An answer
    without its question may belong to another pair.
    """
    lonely = ""
    for pair in PAIRS:
        name = row.name(pair.question)
        if name is None:
            continue
        question, answer = _question(row, pair), row.first_filled(pair.answers)
        if question and answer:
            return Columns(question=question, answer=answer)
        if name in question and (empty := row.first(pair.answers)):
            raise DataError(f"{where} column '{empty}' is empty")
        lonely = lonely or (name if answer else "")
    if lonely:
        raise DataError(f"{where} column '{lonely}' is empty")
    return None


def _question(row: Cells, pair: PairShape) -> tuple[str, ...]:
    """Return the columns of a question that say something: its own, and the first of its contexts."""
    return tuple(name for name in (row.filled(pair.question), row.first_filled(pair.contexts)) if name)


def _text(row: Cells, where: str) -> Columns | None:
    """Return the column of plain text; DataError where it may be half of a pair."""
    name = row.filled(TEXT)
    if name is None:
        return None
    answer = row.first_filled((*LABELS, *ANSWERS))
    if answer:
        raise DataError(
            f"{where} has '{name}' and '{answer}': set context_column {name} and response_column {answer} to "
            f"train on '{answer}', or response_column {name} alone to train on the text"
        )
    question = row.first_filled(pair.question for pair in PAIRS)
    if question:
        raise DataError(
            f"{where} has '{question}' and '{name}': set context_column {question} and response_column "
            f"{name} to train on '{name}' as the answer, or leave '{question}' out to train on the text alone"
        )
    return Columns(text=name)
