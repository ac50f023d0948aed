"""The parser of one answer: text in, as it arrives, and typed parts out.

    parser = AnswerParser(form)
    parts = parser.feed(text) ... parser.finish()

The same whether the text comes at once or in pieces. White space between a thought and what follows, and
around calls, belongs to neither; all other text is kept. Does not know tokens or HTTP. Start at
`AnswerParser`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from runtime.serving.answer_parsers import harmony
from runtime.serving.answer_parsers.forms import AnswerForm, CallFormat, FoundCall, ThoughtFormat, parts_of
from runtime.serving.answer_parsers.parts import ContentDelta, Part, ReasoningDelta, joined
from runtime.serving.answer_parsers.source import WAIT, AnswerSource, Cursor, Steps

MOST_READ_AGAIN = 2**17
"""Characters that may be read in vain, each as often as it was, beyond one for each that is taken."""


class AnswerParser:
    """Reads one answer: `feed` its text as it arrives, then `finish`."""

    def __init__(self, form: AnswerForm, *, marks: Mapping[str, str] | None = None, prompt: str = "") -> None:
        """Read an answer in `form`.

        Args:
            marks: special tokens with the characters that stand for them in the text that is fed.
            prompt: the end of the prompt, special tokens as their names: it may have opened a thought.
        """
        self._source = AnswerSource(marks)
        if form.harmony:
            self._steps: Steps[None] = harmony.read(self._source, form, prompt)
        else:
            self._steps = _read(self._source, form, prompt)

    def feed(self, text: str) -> list[Part]:
        """Return the parts that `text` completes."""
        self._source.add(text)
        return joined(self._parts())

    def finish(self) -> list[Part]:
        """Return the parts that the end of the answer completes."""
        self._source.ended = True
        return joined(self._parts())

    @property
    def taken(self) -> int:
        """Characters of the text, marks included, that are known to be in some part or none."""
        return self._source.taken

    @property
    def held(self) -> int:
        """Characters that wait, marks left out."""
        return self._source.held

    @property
    def thoughts(self) -> deque[tuple[int, int]]:
        """(start, end) of those characters that are reasoning."""
        return self._source.thoughts

    def _parts(self) -> Iterator[Part]:
        for part in self._steps:
            if isinstance(part, str):
                return
            yield part


def _read(source: AnswerSource, form: AnswerForm, prompt: str) -> Steps[None]:
    thought = False
    if form.thoughts is not None:
        thought = yield from _thought(source, form.thoughts, prompt)
    calls = form.calls if form.tools else None
    text = _Text(ContentDelta, drops=thought, holds=calls is not None)
    count = 0
    if calls is not None and calls.bare:
        count = yield from _bare(source, form, calls, text)
    yield from _content(source, form, text, count=count)
    yield from text.end()


def _thought(source: AnswerSource, form: ThoughtFormat, prompt: str) -> Steps[bool]:
    """Read a thought, where there is one, and return whether there was."""
    said = prompt.rstrip()
    opened = said.endswith(form.starts)
    begins = Cursor(source, source.at)
    yield from begins.space()
    starts = source.mark(form.starts)
    if (yield from begins.literal(starts)):
        source.take(begins.at)
    elif not opened and (said.endswith(form.ends) or not form.implied):
        return False
    yield from thinking(source, source.mark(form.ends))
    if form.answer is not None:
        answer = Cursor(source, source.at)
        yield from answer.space()
        if (yield from answer.literal(source.mark(form.answer[:1]))):
            source.take(answer.at)
    return True


def thinking(source: AnswerSource, ends: Sequence[str]) -> Steps[None]:
    """Read reasoning up to one of `ends`, without white space around it."""
    thought = _Text(ReasoningDelta, drops=True, holds=True)
    while True:
        text, end = source.take_before(ends, thought=True)
        yield from thought.add(text)
        source.take(source.at + len(end))
        if end or source.ended:
            return
        yield WAIT


class _Text:
    """Text of one kind, with the white space that may turn out to stand before a call or behind it."""

    def __init__(self, kind: type[ContentDelta] | type[ReasoningDelta], *, drops: bool, holds: bool) -> None:
        """`drops` leaves out white space at the beginning; `holds` waits for what follows white space."""
        self._kind, self._drops, self._holds = kind, drops, holds
        self._held: list[str] = []
        self._said = self._called = False

    def add(self, text: str) -> Iterator[Part]:
        """Yield what of `text` can be said now."""
        text = text.lstrip() if self._drops else text
        said = text.rstrip() if self._holds else text
        if said:
            self._said, self._drops, self._called = True, False, False
            yield self._kind("".join((*self._held, said)))
            self._held.clear()
        if held := text[len(said) :]:
            self._held.append(held)

    def called(self) -> None:
        """Note that a call stands here."""
        self._called = True
        if not self._said:
            self._drops = True
            self._held.clear()

    def end(self) -> Iterator[Part]:
        """Yield what is left at the end of the answer."""
        if self._held and not self._called:
            yield self._kind("".join(self._held))


def _bare(source: AnswerSource, form: AnswerForm, calls: CallFormat, text: _Text) -> Steps[int]:
    """Read calls with which the answer begins, without an opening; return how many there are."""
    cursor = Cursor(source, source.at)
    yield from cursor.space()
    if (yield from cursor.peek()) not in tuple(calls.bare):
        return 0
    at = cursor.at
    if (yield from cursor.literal(source.mark(calls.openings))):  # such as [TOOL_CALLS], spelled as text
        return 0
    cursor.at = at
    found = yield from calls.read(cursor, form.tools)
    if not found or not _declared(found, form):
        yield from text.add(source.take(source.at + 1))  # or the same place may be tried again
        return 0
    text.called()
    source.take(cursor.at)
    return (yield from _said(found, 0, form))


def _content(source: AnswerSource, form: AnswerForm, text: _Text, *, count: int) -> Steps[None]:
    """Read content, with calls in it; what looks like a call and is none is content.

    What is behind the opening of that is read again. Where it is more than `MOST_READ_AGAIN`, as in an answer
    that repeats openings, no further calls are looked for: the work stays linear.
    """
    calls = form.calls if form.tools else None
    openings = source.mark(calls.openings) if calls else ()
    inline = source.mark(calls.inline) if calls else ()
    thoughts, ends = _further_thoughts(source, form)
    again = 0
    while True:
        sought = (*openings, *inline) if again <= MOST_READ_AGAIN + source.taken else ()
        before, opening = source.take_before((*sought, *thoughts))
        yield from text.add(before)
        if not opening:
            if source.ended:
                return
            yield WAIT
            continue
        if opening in thoughts or calls is None:
            source.take(source.at + len(opening))
            yield from thinking(source, ends)
            continue
        cursor = Cursor(source, source.at + (0 if opening in inline else len(opening)))
        found = yield from calls.read(cursor, form.tools)
        called = found and ((opening in openings and not form.only_tools) or _declared(found, form))
        end = cursor.at if called else source.at + len(opening)
        again += max(0, cursor.looked - end)
        before = source.take(end)
        if found and called:
            text.called()
            count = yield from _said(found, count, form)
        else:
            yield from text.add(before)


def _further_thoughts(source: AnswerSource, form: AnswerForm) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what begins and ends thoughts within the answer: only tokens that no text spells by chance."""
    if form.thoughts is None:
        return (), ()
    starts = [start for start in form.thoughts.starts if source.is_marked(start)]
    return source.mark(starts), source.mark(form.thoughts.ends)


def _declared(found: list[FoundCall], form: AnswerForm) -> bool:
    return all(call.name in form.tools for call in found)


def _said(found: list[FoundCall], count: int, form: AnswerForm) -> Steps[int]:
    """Yield the parts of calls, the first of which is number `count`; return the number of the next."""
    for call in found:
        if not (form.one_call and count):
            yield from parts_of(call, count)
        count += 1
    return count
