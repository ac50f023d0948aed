"""The thought that a generation prompt opens (`<think>\n`), or opens and closes, for a reasoning model.

Finds it in a prompt, and tells a row's thought and its end. Knows texts and messages, not templates. Start at
`find_thought`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_KINDS = (
    (r"<(?P<name>[\w:.-]+)>", r"</(?P=name)>", "</{name}>"),
    (r"\[(?P<name>[A-Z_]+)\]", r"\[/(?P=name)\]", "[/{name}]"),
    (r"◁(?P<name>\w+)▷", r"◁/(?P=name)▷", "◁/{name}▷"),
    (r"<\|START_(?P<name>\w+)\|>", r"<\|END_(?P=name)\|>", "<|END_{name}|>"),
    (r"<\|begin_of_(?P<name>\w+)\|>", r"<\|end_of_(?P=name)\|>", "<|end_of_{name}|>"),
    (r"<\|channel>(?P<name>thought)", r"<channel\|>", "<channel|>"),
)
"""How families write the beginning of a thought and its end: as a pattern, and with the name filled in."""
_PATTERNS = tuple(
    (re.compile(rf"(?P<opening>{opening})(?P<space>\s*)(?P<closed>{closing}\s*)?\Z"), closing_text)
    for opening, closing, closing_text in _KINDS
)
_ENDS = re.compile("|".join(closing.replace("(?P=name)", r"[\w:.-]+") + r"\Z" for _, closing, _ in _KINDS))
_NAMES = re.compile(r"think|thought|reason|reflect|scratchpad|analysis|cot", re.IGNORECASE)
_LONGEST = 200
"""Characters at the end of a prompt in which a thought is looked for."""

_WRITTEN = tuple(
    re.compile(rf"(?P<opening>{opening})(?P<thought>.*?)(?P<closing>{closing})", re.DOTALL)
    for opening, closing, _ in _KINDS
)
THOUGHT = "the thought in the content of answers"
BESIDE = "the text before or between thoughts in the content of answers"


@dataclass(frozen=True, slots=True)
class OpenThought:
    """What a generation prompt ends with."""

    at: int
    """Where in the prompt it begins."""
    opening: str
    closing: str
    space: str
    """Between the opening and the thought."""
    closed: bool
    """Whether the prompt closes the thought too, so that the model does not think."""

    def is_left_open(self, rest: str) -> bool:
        """Return whether an answer that goes on as `rest` would lie within the thought."""
        return not self.closed and self.closing not in rest and bool(_NAMES.search(self.opening))

    def of(self, message: dict[str, Any]) -> str:
        """Return the thought of a row's message, "" where it has none."""
        given, content = message.get("reasoning_content"), message.get("content")
        if not given and isinstance(content, str) and self.closing in content:
            given = content.split(self.closing)[0].split(self.opening)[-1]
        return str(given or "").strip("\n")

    def written(self, body: str, message: dict[str, Any]) -> int | None:
        """Return where a thought begins in an answer as the template writes it; None without one."""
        if body.startswith(self.opening) and self.closing in body:
            return self.begins_in(body)
        if self.closing in body and self.closing in str(message.get("content")):
            return len(body) - len(
                body.lstrip("\n")
            )  # the row leaves out the beginning, which the prompt has
        return None

    def begins_in(self, body: str) -> int:
        """Return where the thought begins in `body`, which begins with the opening."""
        after = len(self.opening)
        return after + len(self.space) if body.startswith(self.space, after) else after

    def skip(self, body: str) -> tuple[int, str] | None:
        """Return where in `body` the answer begins and the thought before it; None where that has no end."""
        if not body.startswith(self.opening):
            return 0, ""
        thought, found, answer = body[len(self.opening) :].partition(self.closing)
        if not found:
            return None
        return len(body) - len(answer.lstrip("\n")), thought.strip()

    def samples(self, thought: str, content: str) -> Iterator[dict[str, Any]]:
        """Yield answers with this thought, in a field of its own and within the content."""
        yield {"role": "assistant", "content": content, "reasoning_content": thought}
        written = f"{self.opening}{self.space}{thought}{self._usual_closing}{content}"
        yield {"role": "assistant", "content": written}

    def closing_of(self, between: Iterable[str]) -> str:
        """Return the end of a thought as templates write it: the first text between thought and answer."""
        return next((text for text in between if self.closing in text), self._usual_closing)

    @property
    def _usual_closing(self) -> str:
        return f"\n{self.closing}\n\n" if "\n" in self.space else self.closing


def marked_contents(content: str, mark: str) -> Iterator[tuple[str, str]]:
    """Yield the parts that `content` has beside a thought written in it, each with `mark` at its end.

    Nothing for a content without a whole thought.
    """
    found = [match for pattern in _WRITTEN for match in pattern.finditer(content)]
    thoughts = [match for match in found if _NAMES.search(match["opening"])]
    before = 0
    for match in thoughts:
        if content[before : match.start()].strip():
            yield BESIDE, f"{content[: match.start()].rstrip()}{mark}{content[match.start() :]}"
        if match["thought"].strip():
            at = match.start("thought") + len(match["thought"].rstrip())
            yield THOUGHT, f"{content[:at]}{mark}{content[at:]}"
        before = match.end()


def find_thought(prompt: str) -> OpenThought | None:
    """Return the thought that `prompt` ends with, None where it ends otherwise."""
    before = max(0, len(prompt) - _LONGEST)
    for pattern, closing in _PATTERNS:
        if found := pattern.search(prompt, before):
            return OpenThought(
                at=found.start(),
                opening=found["opening"],
                closing=closing.format(name=found["name"]),
                space=found["space"],
                closed=found["closed"] is not None,
            )
    return None


def separators_behind(prompt: str, rest: str, message: dict[str, Any]) -> int:
    """Return how many line breaks, at the start of the answer `rest`, only end a thought of the row.

    0 unless `prompt` ends with the end of a thought (DeepSeek V3.1: `</think>`), as far as which the
    template takes the row's content away: what separated the two is not the answer's.
    """
    end = _ENDS.search(prompt, max(0, len(prompt) - _LONGEST))
    if not end or not _NAMES.search(end[0]) or end[0] in rest:
        return 0
    return len(rest) - len(rest.lstrip("\n")) if end[0] in str(message.get("content")) else 0
