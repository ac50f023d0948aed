"""From the tokens of one answer to its parts: decoded, read in its model's format, and ended by stop strings.

Special tokens that the text leaves out and the format needs are met as tokens (`marks`). Stop strings end
content only: a thought or a call that holds one goes on. Knows ids and strings, not engines or HTTP. Start at
`AnswerText.push`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.serving.answer_parsers.forms import AnswerForm
from runtime.serving.answer_parsers.harmony import DELIMITERS
from runtime.serving.answer_parsers.parser import AnswerParser
from runtime.serving.answer_parsers.parts import ContentDelta, Part, ReasoningDelta, joined
from runtime.serving.detokenize import FIRST_MARK, Decode, Detokenizer, StopRules, StopScanner, marked


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """The end of a prompt."""

    tokens: Sequence[int] = ()
    """Those before the answer, where it continues their text."""
    text: str = ""
    """Special tokens as their names."""


class AnswerText:
    """Turns one answer's tokens into parts: `push` each, then `finish`."""

    def __init__(
        self,
        decode: Decode,
        form: AnswerForm,
        *,
        stops: StopRules,
        special: Mapping[str, int],
        prompt: PromptEnd | None = None,
    ) -> None:
        """Read an answer in `form`.

        Args:
            decode: the text of tokens, as it is shown.
            form: the format, and the tools that may be called.
            stops: which content ends the answer.
            special: the special tokens that `decode` leaves out, with their ids.
            prompt: what the answer follows.
        """
        seen = [*delimiters(form), *stops.strings]
        met = [text for text in special if any(text in each for each in seen)]
        marks = {text: chr(FIRST_MARK + n) for n, text in enumerate(met)}
        self._marks = {special[text]: mark for text, mark in marks.items()}
        self._unmarked = str.maketrans(dict.fromkeys(marks.values(), ""))
        prompt = prompt or PromptEnd()
        self._detokenizer = Detokenizer(decode, prompt.tokens)
        self._parser = AnswerParser(form, marks=marks, prompt=prompt.text)
        self._rules = stops
        self._strings = {marked(stop, marks): stop for stop in stops.strings}
        self._scanner = StopScanner(tuple(self._strings))
        self._starts: deque[int] = deque()  # where tokens begin that are not counted yet
        self._tokens = self._fed = self._shown = self._settled = 0
        self.decoded = ""
        """The text that the last token completed, whatever part of the answer it is."""
        self.settled = 0
        """Characters that the last token settled: they are in some part, or in none."""
        self.reasoning_tokens = 0
        """Tokens that begin within a thought, so far."""

    @property
    def stop(self) -> str:
        """The stop string that was met, "" before one was."""
        return self._strings.get(self._scanner.found, "")

    def push(self, token: int) -> tuple[list[Part], bool]:
        """Return the parts that `token` completes, and whether a stop string was met."""
        self._tokens += 1
        self._starts.append(self._fed)
        self.decoded = self._detokenizer.push(token)
        text = self.decoded + self._marks.get(token, "")
        self._fed += len(text)
        return self._ended(self._parser.feed(text))

    def finish(self) -> tuple[list[Part], bool]:
        """Return the parts that the answer's end completes, and whether a stop string was met in them."""
        self.decoded = self._detokenizer.flush()
        self._fed += len(self.decoded)
        parts = self._parser.feed(self.decoded) + self._parser.finish()
        parts, stopped = self._ended(parts)
        if not stopped and (text := self._plain(self._scanner.flush())):
            parts = joined([*parts, ContentDelta(text)])
        return parts, stopped

    def _ended(self, parts: list[Part]) -> tuple[list[Part], bool]:
        """Return `parts` up to a stop string in their content, without marks."""
        self._shown += len(self.decoded)
        self._count()
        shown: list[Part] = []
        for part in parts:
            if isinstance(part, ContentDelta):
                counts = self._tokens > self._rules.min_tokens
                text, stopped = self._scanner.push(part.text, counts=counts)
                text = self._plain(text) + (self._said_stop() if stopped else "")
                shown += [ContentDelta(text)] * bool(text)
                if stopped:
                    cut = len(self._plain(self._scanner.after)) + self._unsaid_stop()
                    self._settle(self._shown - self._parser.held - cut)
                    return shown, True
            else:
                shown += self._interrupted(part)
        self._settle(self._shown - self._parser.held - len(self._plain(self._scanner.held)))
        return joined(shown), False

    def _interrupted(self, part: Part) -> Iterator[Part]:
        """Yield a part that is no content, after the content that waited for a stop string."""
        if text := self._plain(self._scanner.flush()):
            yield ContentDelta(text)
        if not isinstance(part, ReasoningDelta):
            yield part
        elif text := self._plain(part.text):
            yield ReasoningDelta(text)

    def _said_stop(self) -> str:
        return self._strings[self._scanner.found] if self._rules.included else ""

    def _unsaid_stop(self) -> int:
        return 0 if self._rules.included else len(self._plain(self._scanner.found))

    def _settle(self, until: int) -> None:
        """Note how much of the text is settled; it is never less than it was."""
        until = max(until, self._settled)
        self.settled, self._settled = until - self._settled, until

    def _plain(self, text: str) -> str:
        return text.translate(self._unmarked) if self._marks else text

    def _count(self) -> None:
        """Count the reasoning tokens among those whose text the parser has taken."""
        thoughts = self._parser.thoughts
        while self._starts and self._starts[0] < self._parser.taken:
            start = self._starts.popleft()
            while thoughts and thoughts[0][1] <= start:
                thoughts.popleft()
            self.reasoning_tokens += bool(thoughts) and thoughts[0][0] <= start


def delimiters(form: AnswerForm) -> tuple[str, ...]:
    """Return all texts that a format looks for: the special tokens among them must reach it."""
    if form.harmony:
        return DELIMITERS
    found: tuple[str, ...] = ()
    if form.thoughts is not None:
        found += (*form.thoughts.starts, *form.thoughts.ends, *(form.thoughts.answer or ()))
    if form.calls is not None and form.tools:
        found += (*form.calls.openings, *form.calls.inside)
    return found
