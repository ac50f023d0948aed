"""Which formats a model answers in: those it is told, else those that its chat template and tokens show.

A template that writes calls into a conversation writes them as the model does: the format that reads them
back is the model's. Does not know tokenizers. Start at `chosen`.
"""

import json
from collections.abc import Container, Iterator

from runtime.chat_template.features import PROBED_CALL, TemplateFeatures
from runtime.chat_template.thoughts import find_thought
from runtime.serving.answer_parsers.formats import (
    CALLS,
    HARMONY_CALLS,
    HARMONY_REASONING,
    HERMES,
    REASONING,
    THINK,
)
from runtime.serving.answer_parsers.forms import AnswerForm, CallFormat, ThoughtFormat
from runtime.serving.answer_parsers.harmony import CHANNEL, MESSAGE
from runtime.serving.answer_parsers.parser import AnswerParser
from runtime.serving.answer_parsers.parts import ParsedAnswer

_ORDER = (
    "mistral", "deepseek_v31", "deepseek_v3", "kimi_k2", "seed_oss", "minimax_m2", "qwen3_coder", "glm45",
    "internlm", "gemma4", "granite-20b-fc", "lfm2", "llama4_pythonic", "jamba", "hermes", "granite",
    "phi4_mini_json", "llama3_json", "pythonic",
)  # fmt: skip
"""Formats in the order in which they are tried: what one shares with another is the later one's."""

_DELIMITERS = frozenset(each for form in CALLS.values() if form is not None for each in form.inside)
"""None of which is left where a call was read in the right format."""


def chosen(
    features: TemplateFeatures,
    tokens: Container[str],
    *,
    reasoning: str | None = None,
    calls: str | None = None,
) -> AnswerForm:
    """Return the form of a model's answers, without tools.

    Args:
        features: what its chat template renders.
        tokens: its added tokens.
        reasoning: vLLM's name of a format of thoughts; one that is not known here counts as none.
        calls: the same of calls.
    """
    named = {reasoning, calls}
    if HARMONY_REASONING in named or HARMONY_CALLS in named:
        return AnswerForm(harmony=True)
    written = features.written_call + features.written_thought
    if reasoning is None and calls is None:
        in_channels = all(each in tokens or each in written for each in (CHANNEL, MESSAGE))
        if in_channels:
            return AnswerForm(harmony=True)
    thoughts = REASONING.get(reasoning or "") or _thoughts(features, tokens)
    return AnswerForm(thoughts=thoughts, calls=CALLS.get(calls or "") or _calls(features, tokens))


def _thoughts(features: TemplateFeatures, tokens: Container[str]) -> ThoughtFormat | None:
    """Return the format of thoughts that a template opens or writes, or that has tokens of its own."""
    known = [form for form in (THINK, *REASONING.values()) if form is not None]
    opening = features.opens_thought or features.opens_thought_on
    if opening:
        found = next((form for form in known if opening in form.starts), None)
        thought = find_thought(opening)
        if found is not None or thought is None:
            return found
        return ThoughtFormat((thought.opening,), (thought.closing,))
    written = features.written_thought
    for form in known:
        if any(start in written for start in form.starts) and any(end in written for end in form.ends):
            return form
    return next((form for form in known if _token(form.starts[0]) in tokens and form.ends[0] in tokens), None)


def _token(start: str) -> str:
    """Return the token with which thoughts begin: Gemma 4 writes a word behind it."""
    return start[: start.find(">") + 1] or start


def _calls(features: TemplateFeatures, tokens: Container[str]) -> CallFormat:
    """Return the format of calls that a template writes, or that has tokens of its own."""
    candidates = [(name, form) for name in _ORDER if (form := CALLS[name]) is not None]
    for _, form in candidates:
        if features.written_call and _reads(form, features.written_call):
            alike = [each for _, each in candidates if each.read == form.read]
            return next((each for each in alike if _spells(each, features.written_call)), form)
    for name, form in candidates:
        if name != "granite" and any(opening in tokens for opening in form.openings):
            return form
    return HERMES


def _reads(form: CallFormat, written: str) -> bool:
    """Return whether a format finds in a text the one call that was rendered into it."""
    name, arguments = PROBED_CALL
    tools = {name: {"properties": {key: {"type": "string"} for key in arguments}}}
    tagged = any(opening in written for opening in form.openings)
    if form.openings and not tagged and not form.inline:
        return False
    for text in _starts(written, tagged=tagged):
        answer = ParsedAnswer()
        parser = AnswerParser(AnswerForm(calls=form, tools=tools))
        answer.add(parser.feed(text) + parser.finish())
        found = [(call.name, json.loads(call.arguments)) for call in answer.calls]
        if found == [(name, arguments)] and not any(each in answer.content for each in _DELIMITERS):
            return True
    return False


def _spells(form: CallFormat, written: str) -> bool:
    """Return whether a call is spelled in a text as a format has it, up to its arguments."""
    name, _ = PROBED_CALL
    return form.spelling.call.partition("{arguments}")[0].replace("{name}", name) in written


def _starts(written: str, *, tagged: bool) -> Iterator[str]:
    """Yield the text, and for calls without an opening what follows the header of the turn in it."""
    yield written
    if not tagged:
        yield from (written[at:] for at in range(len(written)) if written[at] in "{[" and at)
