"""harmony, the form of gpt-oss: messages in channels, between special tokens.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f
    <|constrain|>json<|message|>{…}<|call|>

`analysis` is reasoning, `final` and a `commentary` without recipient are content, and what is sent to
functions.NAME is a call. Start at `read`.
"""

import re

from runtime.serving.answer_parsers.forms import AnswerForm, FoundCall, arguments_text, parts_of
from runtime.serving.answer_parsers.parts import ContentDelta, ReasoningDelta
from runtime.serving.answer_parsers.source import WAIT, AnswerSource, Cursor, Steps

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, RETURN, CALL = "<|constrain|>", "<|return|>", "<|call|>"
DELIMITERS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
"""All that the parser is to see, although they are special tokens."""

_RECIPIENT = re.compile(r"to=([\w.\-/:@]+)")
_CHANNEL = re.compile(r"\s*(\w+)")
_BETWEEN = "\n\n"
"""Between the texts of two messages."""


def read(source: AnswerSource, form: AnswerForm, prompt: str) -> Steps[None]:
    """Read an answer in channels."""
    header = _opened(prompt)
    kinds = dict.fromkeys((ReasoningDelta, ContentDelta), "")  # what stands before the next text of a kind
    calls = 0
    while True:
        if header is None:
            header = yield from _header(source)
            if header is None:
                return
        channel, recipient = _meaning(header, source)
        header = None
        name = _function(recipient, form)
        if name is None:
            kind = ReasoningDelta if channel == "analysis" else ContentDelta
            if (yield from _text(source, kind, kinds[kind])):
                kinds[kind] = _BETWEEN
            continue
        body = yield from _body(source)
        arguments = arguments_text(body) if body.strip() else None
        if arguments is None:
            if body:
                yield ContentDelta(kinds[ContentDelta] + body)
                kinds[ContentDelta] = _BETWEEN
            continue
        if not (form.one_call and calls):
            yield from parts_of(FoundCall(name, arguments), calls)
        calls += 1


def _opened(prompt: str) -> str | None:
    """Return the header of the message that the prompt began and did not end."""
    _, started, said = prompt.rpartition(START)
    header, begun, _ = said.partition(MESSAGE)
    return header if started and begun else None


def _header(source: AnswerSource) -> Steps[str | None]:
    """Go to the text of the next message, and return what stands before it; None at the end."""
    start, channel, message, end, done, call = source.mark((START, CHANNEL, MESSAGE, END, RETURN, CALL))
    while True:
        cursor = Cursor(source, source.at)
        yield from cursor.space()
        found = yield from cursor.literal((start, channel, message, end, done, call, "to="))
        if found == message or found in (end, done, call):
            source.take(cursor.at)
            if found == message:
                return ""
            continue
        if not found:  # a text outside of any message
            more = yield from cursor.peek()
            source.take(cursor.at)
            return "" if more else None
        text, _ = yield from cursor.until((message,))
        if text is None:  # of a header that was cut
            source.take(len(source.text))
            return None
        return source.take(cursor.at)


def _meaning(header: str, source: AnswerSource) -> tuple[str, str]:
    """Return the channel and the recipient of a message, "" for what its header does not say."""
    (mark,) = source.mark((CHANNEL,))
    _, _, after = header.replace(mark, CHANNEL).rpartition(CHANNEL)
    channel, recipient = _CHANNEL.match(after), _RECIPIENT.search(header)
    return channel[1] if channel else "", recipient[1] if recipient else ""


def _function(recipient: str, form: AnswerForm) -> str | None:
    """Return the function that a message calls; None for a text, and for tools that nobody asked for."""
    if not form.tools:
        return None
    name = recipient.removeprefix("functions.")
    return name if name in form.tools or (name != recipient and not form.only_tools) else None


def _body(source: AnswerSource) -> Steps[str]:
    """Take the text of a message whole."""
    cursor = Cursor(source, source.at)
    text, end = yield from cursor.until(_ends(source), or_end=True)
    source.take(cursor.at - len(end))
    return text or ""


def _text(source: AnswerSource, kind: type[ReasoningDelta] | type[ContentDelta], before: str) -> Steps[bool]:
    """Read the text of a message as it arrives, and return whether it has any."""
    ends, said = _ends(source), False
    while True:
        text, end = source.take_before(ends, thought=kind is ReasoningDelta)
        if text:
            yield kind(text if said else before + text)
            said = True
        if end or source.ended:
            return said
        yield WAIT


def _ends(source: AnswerSource) -> tuple[str, ...]:
    return source.mark((END, RETURN, CALL, START, CHANNEL))
