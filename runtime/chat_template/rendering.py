"""The text of a conversation, the same for serving and for tuning.

Messages, tools and ids of calls are given as the template takes them (features.py); it is rendered in a
process of its own, with limits (renderer.py). Does not know requests, rows or token ids. Start at `render`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from runtime.chat_template import renderer
from runtime.chat_template.features import TemplateFeatures, Turn, probe, system_with_tools
from runtime.chat_template.messages import prepared
from runtime.errors import ConfigError, TemplateLimitError, TemplateLongError, TemplateRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 64 << 20
"""Of the text of a conversation, where nothing else limits it."""
PROBED_CHARACTERS = 1 << 20
"""Of the texts that a template is tried with."""
PROBE_S = 20.0
"""For all of those texts together; public templates take 0.3 s. Adapters wait for one another meanwhile."""
TOOL_USE, RAG, DEFAULT = "tool_use", "rag", "default"
"""The names of a model's templates: with tools, with documents, for everything else."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How one conversation is rendered."""

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template may read."""
    begins_answer: bool = True
    """Whether the text ends where the assistant begins to speak."""
    continues_last: bool = False
    """Whether the text ends with that of the last message, which the answer continues."""
    adds_special: bool = False
    """Whether the tokenizer's opening tokens come before what the template writes."""
    most_characters: int = MOST_CHARACTERS
    """Of the text: rendering ends there."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation, and where in it the template says that the model speaks."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """(start, end) of each `{% generation %}` block, in characters."""


def source(
    tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool = False, with_documents: bool = False
) -> str:
    """Return the template that a conversation with tools, documents or neither is rendered with; "" for none.

    Of a model's named templates, a single one is for everything. ConfigError where no name says which is.
    """
    template: Any = tokenizer.chat_template
    if not isinstance(template, dict):
        return template or ""
    named = {name: text for name, text in template.items() if text}
    wanted = [TOOL_USE] * with_tools + [RAG] * with_documents + [DEFAULT]
    if found := next((named[name] for name in wanted if name in named), None):
        return str(found)
    if len(named) == 1:
        return str(next(iter(named.values())))
    if named:
        names = ", ".join(sorted(map(str, named)))
        raise ConfigError(
            f"the model has chat templates named {names}, none named {DEFAULT}; choose one as chat_template"
        )
    return ""


def features(
    tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool = False, with_documents: bool = False
) -> TemplateFeatures:
    """Return what the template renders that a conversation of this kind gets.

    ConfigError for a template that is none, or that takes too much for a question.
    """
    template = source(tokenizer, with_tools=with_tools, with_documents=with_documents)
    return _features(template, _special(tokenizer))


def check(template: str) -> None:
    """Raise ConfigError for a template that is no Jinja, takes too much, or cannot render one question."""
    job = {
        "turns": [{"role": "user", "content": "Hello"}],
        "variables": {"add_generation_prompt": True, "bos_token": "", "eos_token": ""},
        "continues": False,
        "marked": False,
        "most": PROBED_CHARACTERS,
    }
    try:
        renderer.shared().render(template, job)
    except TemplateRefusedError as error:
        raise ConfigError(f"the chat template cannot render one question: {error}") from None


def marks_answers(template: str) -> bool:
    """Return whether a template has `{% generation %}` blocks: it says itself what the model writes."""
    return renderer.shared().facts(template).marks_answers


def is_slow(tokenizer: "PreTrainedTokenizerBase", options: TemplateOptions) -> bool:
    """Return whether the template of such a conversation was ended by its limits lately."""
    return renderer.shared().is_slow(_source(tokenizer, options))


def render(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions) -> str:
    """Return the text of a conversation.

    Raises TemplateRefusedError for what the template refuses, TemplateLongError for a text longer than
    options.most_characters, TemplateLimitError where it takes too much; ConfigError without a template.
    """
    return _rendered(tokenizer, turns, options, marked=False)[0]


def render_marked(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions
) -> Rendering:
    """Return the text that `render` does, with its `{% generation %}` blocks; raises alike."""
    text, answers = _rendered(tokenizer, turns, options, marked=True)
    return Rendering(text, tuple(answers))


def _source(tokenizer: "PreTrainedTokenizerBase", options: TemplateOptions) -> str:
    return source(tokenizer, with_tools=bool(options.tools), with_documents=bool(options.documents))


def _rendered(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions, *, marked: bool
) -> tuple[str, list[tuple[int, int]]]:
    template, special = _source(tokenizer, options), _special(tokenizer)
    if not template:
        raise ConfigError("the model has no chat template")
    if not turns:
        raise TemplateRefusedError("the conversation has no messages")
    known = _features(template, special)
    given = prepared(turns, known)
    variables = {**dict(special), **options.variables, "documents": options.documents, "tools": None}
    if options.tools:
        variables |= {"tools": options.tools, known.tool_variable: options.tools}
        given = system_with_tools(given, options.tools) if known.tools == "system" else given
    variables["add_generation_prompt"] = options.begins_answer and not options.continues_last
    job = {
        "turns": given,
        "variables": variables,
        "continues": options.continues_last,
        "marked": marked,
        "most": options.most_characters,
    }
    return renderer.shared().render(template, job)


def _special(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[str, Any], ...]:
    """Return the special tokens by name, as variables for the template."""
    named = tokenizer.special_tokens_map.items()
    return tuple((name, text if type(text) is str else str(text)) for name, text in named)


@lru_cache(maxsize=256)
def _features(template: str, special: tuple[tuple[str, Any], ...]) -> TemplateFeatures:
    if not template:
        return TemplateFeatures()
    rendering = renderer.shared()
    facts = rendering.facts(template)
    tokens = {"bos_token": "", "eos_token": "", **dict(special)}
    until = time.monotonic() + PROBE_S

    def attempt(turns: list[Turn], *, begins_answer: bool = True, **variables: Any) -> str | None:
        if time.monotonic() > until:
            raise ConfigError(
                f"the chat template is refused: to ask what it renders takes more than {PROBE_S:g} s"
            )
        given = {"tools": None, "documents": None, "add_generation_prompt": begins_answer, **tokens}
        job = {"turns": turns, "variables": given | variables, "most": PROBED_CHARACTERS}
        try:
            return rendering.render(template, {**job, "continues": False, "marked": False})[0]
        except (TemplateLimitError, TemplateLongError) as error:
            raise ConfigError(f"the chat template is refused: for one question {error}") from None
        except TemplateRefusedError:
            return None

    return probe(attempt, words=facts.words, marks_answers=facts.marks_answers)
