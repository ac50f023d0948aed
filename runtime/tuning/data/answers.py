"""One answer of a conversation: what the server would render before it, and what the model would then write.

The prompt is the messages before the answer with the generation prompt. The completion is read off the
template: its `{% generation %}` blocks, else what the conversation with the answer has more than the prompt,
up to the token that ends the turn. Does not know rows or token ids. Start at `AnswerReader.answer`.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime import chat_template
from runtime.chat_template import Rendering, TemplateOptions, Turn
from runtime.chat_template.thoughts import OpenThought, find_thought, separators_behind
from runtime.errors import ConfigError, DataError, TemplateRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_CONTENT, _ARGUMENT = "8067142935201746", "5390271846613708"
"""Stand for a message's content and a call's argument: digits, which no template trims or capitalises."""
_MOST_ROLES = 8

SYSTEM_ROLES = frozenset({"system", "developer"})
"""Of messages that nobody answers."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a sequence's text that is labelled, or not."""

    text: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """The prompt of an assistant turn, and what follows it."""

    prompt: str
    pieces: tuple[Piece, ...]
    closed: bool
    """Whether the template writes a token that ends the turn; else the tokenizer's follows."""

    @property
    def text(self) -> str:
        return self.prompt + "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages as the server gives them to templates, and the tools that they may call."""

    messages: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def until(self, count: int) -> "Dialogue":
        return replace(self, messages=self.messages[:count])

    def ending_with(self, message: Turn) -> "Dialogue":
        """Return the conversation with another last message."""
        return replace(self, messages=(*self.messages[:-1], message))


def dialogue(messages: Iterable[Turn], tools: Iterable[dict[str, Any]] = ()) -> Dialogue:
    """Return a conversation as the server would render it: contents that are None are empty texts."""
    filled = ({**m, "content": ""} if m.get("content") is None else m for m in messages)
    return Dialogue(tuple(filled), tuple(tools))


@dataclass(frozen=True, slots=True)
class _Start:
    """Where in a rendered conversation the answer's part begins."""

    prompt: str
    at: int
    """Where the answer begins in the rendering."""
    thought: str = ""
    """What comes between the prompt and that, as the template leaves it out: a thought and its end."""


@dataclass(frozen=True, slots=True)
class _Tail:
    """What a template writes at the end of an answer, from its end token on."""

    text: str
    kept: int
    """Characters of the end token; 0 where there is none, and all of `text` is no answer."""


class AnswerReader:
    """Reads answers off one model's chat template, and remembers how it ends them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", end_ids: frozenset[int]) -> None:
        """The server stops at `end_ids`; ConfigError where the model has no template."""
        if not tokenizer.chat_template:
            raise ConfigError("no chat template in this model; set chat_template in ModelConfig")
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {str(token) for token in added.values() if token.special} | {*tokenizer.all_special_tokens}
        ends = {str(tokenizer.decode([number])) for number in end_ids}
        self._end_tokens, self._special_tokens = _any_of(ends), _any_of(special)
        self._tails: dict[bool, _Tail] = {}
        self._closings: dict[str, str] = {}
        self._said: set[tuple[object, ...]] = set()

    def answer(self, dialogue: Dialogue, index: int) -> Answer:
        """Return message `index` as prompt and completion; DataError where the template leaves them open."""
        whole = dialogue.until(index + 1)
        shown, asked = self._render(whole), self._asked(dialogue.until(index))
        start = self._start(whole, shown.text, asked.text if asked else None)
        tail = self._tail(whole, shown.text)
        written = len(shown.text) - len(tail.text)
        if not shown.text[start.at : written].strip() and _says(whole.messages[-1]):
            raise DataError(f"the model's chat template writes nothing of {_name(whole)}")
        end = written + tail.kept
        spans: tuple[tuple[int, int], ...] = ((start.at, end),)
        if chat_template.marks_answers(self._template(whole)):
            spans = self._marked(
                whole, shown, start=start.at, end=end, before=len(asked.generated) if asked else None
            )
        return Answer(start.prompt, _pieces(shown.text, start, spans), tail.kept > 0)

    def text(self, dialogue: Dialogue) -> str:
        """Return the rendering of a conversation; DataError where the template refuses it."""
        return self._render(dialogue).text

    def _template(self, dialogue: Dialogue) -> str:
        return chat_template.source(self._tokenizer, with_tools=bool(dialogue.tools))

    def _render(self, dialogue: Dialogue, *, prompt: bool = False) -> Rendering:
        options = TemplateOptions(tools=list(dialogue.tools) or None, begins_answer=prompt)
        try:
            if chat_template.marks_answers(self._template(dialogue)):
                return chat_template.render_marked(self._tokenizer, dialogue.messages, options)
            return Rendering(chat_template.render(self._tokenizer, dialogue.messages, options), ())
        except TemplateRefusedError as refusal:
            roles = [str(message["role"]) for message in dialogue.messages]
            more = f" and {len(roles) - _MOST_ROLES} more" if len(roles) > _MOST_ROLES else ""
            raise DataError(
                "the model's chat template refuses a conversation of "
                f"{', '.join(roles[:_MOST_ROLES])}{more}: {refusal}"
            ) from None

    def _probe(self, dialogue: Dialogue) -> str:
        """Return the rendering of a conversation that is not the row's; "" where the template refuses it."""
        try:
            return self._render(dialogue).text
        except DataError:
            return ""

    def _asked(self, context: Dialogue) -> Rendering | None:
        """Return the prompt after `context`; None where the server could not be asked there."""
        if not any(message["role"] not in SYSTEM_ROLES for message in context.messages):
            try:
                return self._render(context, prompt=True) if context.messages else None
            except DataError:
                return None
        return self._render(context, prompt=True)

    def _header(self, whole: Dialogue) -> str | None:
        """Return what the template writes before the content of the last message, were it plain text."""
        before, found, _ = self._probe(
            whole.ending_with({"role": "assistant", "content": _CONTENT})
        ).partition(_CONTENT)
        return before if found else None

    def _start(self, whole: Dialogue, shown: str, prompt: str | None) -> _Start:
        """Return where the answer begins in `shown`, the rendering that ends with it."""
        if prompt is None:
            header = self._header(whole)
            if header is not None and shown.startswith(header):
                return _Start(header, len(header))
            raise _undecided(whole, "the answer's beginning is not that of other answers")
        thought = find_thought(prompt)
        if shown.startswith(prompt) and not (thought and thought.is_left_open(shown[len(prompt) :])):
            at = len(prompt)
            return _Start(prompt, at + separators_behind(prompt, shown[at:], whole.messages[-1]))
        if thought and (start := self._behind(thought, whole, shown, prompt)):
            return start
        header = self._header(whole)
        if header is not None and shown.startswith(header) and prompt.startswith(header):
            return _Start(prompt, len(header))
        # The answer changes what comes before it: thoughts of earlier steps go once there is a final answer.
        context = self._render(whole.until(len(whole.messages) - 1)).text
        opening = prompt.removeprefix(context) if prompt.startswith(context) else ""
        at = (header or "").rfind(opening) + len(opening)
        if opening and header and opening in header and shown.startswith(header[:at]):
            return _Start(prompt, at)
        if header and (start := self._after_question(whole, shown, prompt, header)):
            return start
        begins = shown.removeprefix(context)[:30] if shown.startswith(context) else shown[-30:]
        raise _undecided(
            whole, f"it writes {begins!r} there without its generation prompt {(opening or prompt)[-40:]!r}"
        )

    def _after_question(self, whole: Dialogue, shown: str, prompt: str, header: str) -> _Start | None:
        """Return where the answer begins by what a prompt has after the last question's content.

        For templates that show a question otherwise once it is answered: Mistral's then leave out the
        system's message.
        """
        question = {**whole.messages[-2], "content": _ARGUMENT}
        answered = whole.until(len(whole.messages) - 1).ending_with(question)
        sample = replace(whole, messages=(*answered.messages, {"role": "assistant", "content": _CONTENT}))
        try:
            _, asked, after = self._render(answered, prompt=True).text.rpartition(_ARGUMENT)
        except DataError:
            return None
        between = self._probe(sample).rpartition(_ARGUMENT)[2].partition(_CONTENT)[0]
        at = len(header) - len(between) + len(after)
        fits = asked and after and between.startswith(after) and prompt.endswith(after)
        return _Start(prompt, at) if fits and shown.startswith(header[:at]) else None

    def _behind(self, thought: OpenThought, whole: Dialogue, shown: str, prompt: str) -> _Start | None:
        """Return where the answer begins behind a generation prompt that ends with a thought's beginning."""
        base = prompt[: thought.at]
        if not shown.startswith(base):
            base = self._header(whole) or ""
            if not base or not shown.startswith(base):
                return None
        message, body = whole.messages[-1], shown[len(base) :]
        if thought.closed:
            skipped = thought.skip(body)
            if skipped and (skipped[1] or thought.of(message)):
                self._say("the generation prompt closes the thought: the thoughts of rows are not trained")
            return _Start(prompt, len(base) + skipped[0]) if skipped else None
        self._say(
            "the generation prompt opens a thought (%s): a row's thought is trained with its end, "
            "an empty one where a row has none",
            thought.opening,
        )
        written = thought.written(body, message)
        if written is not None:
            return _Start(prompt, len(base) + written)
        at = len(base)
        if body.startswith(thought.opening):
            if not thought.is_left_open(body):
                return None
            at += thought.begins_in(body)
            body = shown[at:]
        closing = self._closings.get(thought.opening)
        if closing is None:
            closing = self._closings[thought.opening] = thought.closing_of(self._ends_of_thoughts(thought))
        blank = len(body) - len(body.lstrip("\n")) if closing.endswith("\n") else 0
        return _Start(prompt, at + blank, thought.of(message) + closing)

    def _ends_of_thoughts(self, thought: OpenThought) -> Iterable[str]:
        """Yield what the template writes of answers with a thought."""
        for message in thought.samples(_ARGUMENT, _CONTENT):
            text = self._probe(Dialogue(({"role": "user", "content": "q"}, message)))
            yield text.partition(_ARGUMENT)[2].partition(_CONTENT)[0] if _CONTENT in text else ""

    def _tail(self, whole: Dialogue, shown: str) -> _Tail:
        """Return what ends the last message in `shown`."""
        calls = bool(whole.messages[-1].get("tool_calls"))
        tail = self._tails.get(calls)
        # A tail without an end token may be that of any text.
        if tail is None or not tail.kept or not shown.endswith(tail.text):
            tail = self._tails[calls] = self._read_tail(whole)
        if not shown.endswith(tail.text):
            raise _undecided(whole, f"it does not end with {tail.text!r} as other answers do")
        return tail

    def _read_tail(self, whole: Dialogue) -> _Tail:
        """Return how the template ends an answer like the last message."""
        message = whole.messages[-1]
        calls = message.get("tool_calls")
        sample: Turn = {"role": "assistant", "content": _CONTENT}
        if calls:
            function = {**calls[-1].get("function", {}), "arguments": {"argument": _ARGUMENT}}
            sample |= {"tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
        text = self._probe(whole.ending_with(sample))
        at = max(text.rfind(_CONTENT), text.rfind(_ARGUMENT))
        if at < 0:
            raise DataError(f"the model's chat template writes nothing of {_name(whole)}")
        after = text[at + len(_CONTENT) :]
        end = self._end_tokens.search(after)
        if end:
            return _Tail(after[end.start() :], len(end[0]))
        special = [*self._special_tokens.finditer(after)]
        if not special:
            return _Tail(after[len(after.rstrip()) :] if calls else after, 0)
        end = special[-1]
        if calls and end[0] != self._end_of_answers(whole):
            self._say("calls end with %s, which ends no answer: the end-of-sequence token follows", end[0])
            return _Tail(after[end.end() :], 0)
        self._say(
            "answers end with %s, which is no end token of this model: a server has to be told of it", end[0]
        )
        return _Tail(after[end.start() :], len(end[0]))

    def _end_of_answers(self, whole: Dialogue) -> str:
        """Return the special token that ends an answer without calls in the place of the last message."""
        text = self._probe(whole.ending_with({"role": "assistant", "content": _CONTENT}))
        special = self._special_tokens.findall(text.rpartition(_CONTENT)[2])
        return str(special[-1]) if special else ""

    def _marked(
        self, whole: Dialogue, shown: Rendering, *, start: int, end: int, before: int | None
    ) -> tuple[tuple[int, int], ...]:
        """Return the `{% generation %}` blocks of the last message, as far as its end token."""
        blocks = shown.generated[before:] if before is not None else shown.generated
        spans = [
            (max(first, start), min(last, end)) for first, last in blocks if last > start and first < end
        ]
        if not spans:
            raise DataError(
                f"the model's chat template has {{% generation %}} blocks, but writes none for {_name(whole)}"
            )
        spans[-1] = (spans[-1][0], end)
        return tuple(spans)

    def _say(self, message: str, *arguments: object) -> None:
        """Log something about the template once."""
        if (message, *arguments) not in self._said:
            self._said.add((message, *arguments))
            log.warning(message, *arguments)


def _pieces(text: str, start: _Start, spans: Iterable[tuple[int, int]]) -> tuple[Piece, ...]:
    pieces = [Piece(start.thought, True)]
    at = start.at
    for first, last in spans:
        pieces += [Piece(text[at:first], False), Piece(text[first:last], True)]
        at = last
    return tuple(piece for piece in pieces if piece.text)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the longest of `texts` at a place; of nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or r"(?!)")


def _says(message: Turn) -> bool:
    content = message["content"]
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def _name(whole: Dialogue) -> str:
    return f"message {len(whole.messages)} ({whole.messages[-1]['role']})"


def _undecided(whole: Dialogue, why: str) -> DataError:
    return DataError(f"the model's chat template leaves open what {_name(whole)} consists of: {why}")
