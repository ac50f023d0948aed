"""A conversation becomes texts to train on, in which the assistant's turns are labelled.

Turn i is a prompt and a completion (answers.py). Turns go on in one sequence while the prompt of the next
begins with all before it; where the template rewrites earlier turns, the next one begins a sequence of its
own. Does not know templates or token ids. Start at `sequences`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from runtime.errors import DataError
from runtime.tuning.data.answers import (
    SYSTEM_ROLES,
    Answer,
    AnswerReader,
    Dialogue,
    Piece,
    dialogue,
)
from runtime.tuning.data.example import Example

LONG = 32
"""Messages from which on a conversation is read piece by piece: rendering it for each turn is quadratic."""
_TURNS_AT_ONCE = 6


@dataclass(frozen=True, slots=True)
class TextSequence:
    """One text that the model is trained on."""

    pieces: tuple[Piece, ...]
    closed: bool
    """Whether it ends with the template's end token; else the tokenizer's follows, and is labelled."""
    turns: tuple[int, ...]
    """Indexes of the messages that are labelled in it."""


def labelled_turns(example: Example) -> list[int]:
    """Return the indexes of the messages that the model is to learn."""
    return [
        index
        for index, message in enumerate(example.messages)
        if message["role"] == "assistant" and index not in example.untrained
    ]


def sequences(example: Example, reader: AnswerReader) -> list[TextSequence]:
    """Return the texts of a conversation; DataError for a turn whose text the template leaves undecided."""
    whole, turns = dialogue(example.messages, example.tools), labelled_turns(example)
    if len(whole.messages) >= LONG and (appended := _piece_by_piece(whole, turns, reader)):
        return [appended]
    return [*_joined((turn, reader.answer(whole, turn)) for turn in turns)]


def is_one_sequence(example: Example, reader: AnswerReader) -> bool:
    """Return whether a conversation of LONG messages or more is certain to be one sequence."""
    whole = dialogue(example.messages, example.tools)
    return _piece_by_piece(whole, labelled_turns(example), reader) is not None


def last_sequence(example: Example, reader: AnswerReader) -> TextSequence:
    """Return the text up to the last labelled turn, with that turn alone labelled: mostly the longest."""
    last = labelled_turns(example)[-1]
    answer = reader.answer(dialogue(example.messages, example.tools), last)
    return next(_joined(iter([(last, answer)])))


def _joined(answers: Iterator[tuple[int, Answer]]) -> Iterator[TextSequence]:
    """Yield sequences, each of as many (message index, answer) as continue one another."""
    pieces: list[Piece] = []
    turns: list[int] = []
    text, closed = "", False
    for turn, answer in answers:
        if closed and answer.prompt.startswith(text):
            pieces.append(Piece(answer.prompt[len(text) :], False))
        else:
            if pieces:
                yield TextSequence(tuple(pieces), closed, tuple(turns))
            pieces, turns = [Piece(answer.prompt, False)], []
        pieces += answer.pieces
        turns.append(turn)
        text, closed = answer.text, answer.closed
    if pieces:
        yield TextSequence(tuple(pieces), closed, tuple(turns))


def _piece_by_piece(whole: Dialogue, turns: Sequence[int], reader: AnswerReader) -> TextSequence | None:
    """Return the one sequence of a long conversation, None where that would not be certain.

    A few turns at a time are read from a short conversation that ends with them. Together they must be the
    text of the whole, and the prompts of its middle and its last turn must end where those begin.
    """
    try:
        first, middle, last = (reader.answer(whole, turns[at]) for at in (0, len(turns) // 2, -1))
        pieces = [Piece(first.prompt, False), *first.pieces]
        for part in range(0, len(turns) - 1, _TURNS_AT_ONCE):
            pieces += _excerpt(whole, turns[part : part + _TURNS_AT_ONCE + 1], reader)
    except DataError:
        return None
    text = "".join(piece.text for piece in pieces)
    ends = {*accumulate(len(piece.text) for piece in pieces)}
    certain = text == last.text and all(
        text.startswith(answer.prompt) and len(answer.prompt) in ends for answer in (middle, last)
    )
    return TextSequence(tuple(pieces), closed=True, turns=tuple(turns)) if certain else None


def _excerpt(whole: Dialogue, turns: Sequence[int], reader: AnswerReader) -> list[Piece]:
    """Return the pieces of `turns` after the first, from a conversation of little more than these.

    Raises DataError where the template rewrites one of them, or refuses such a conversation.
    """
    messages, start = whole.messages, turns[0]
    question = next((at for at in range(start - 1, -1, -1) if messages[at]["role"] == "user"), None)
    system = messages[0]["role"] in SYSTEM_ROLES and start > 0
    kept = [
        *([0] if system else []),
        *([question] if question is not None else []),
        *range(start, turns[-1] + 1),
    ]
    excerpt = replace(whole, messages=tuple(messages[at] for at in kept))
    answers = [reader.answer(excerpt, turn - start + len(kept) - (turns[-1] + 1 - start)) for turn in turns]
    pieces: list[Piece] = []
    for before, after in pairwise(answers):
        if not before.closed or not after.prompt.startswith(before.text):
            raise DataError("the chat template rewrites earlier turns")
        pieces += [Piece(after.prompt[len(before.text) :], False), *after.pieces]
    return pieces
