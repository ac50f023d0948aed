"""The rendering of a conversation with a model's chat template, the same for serving and for tuning.

Templates come from the model or from the job and never from a request; transformers renders them in Jinja's
immutable sandbox. Does not know requests, rows or token ids. Start at `render`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from runtime.chat_template.features import TemplateFeatures, Turn, probe
from runtime.errors import ConfigError, Failure, TemplateRefusedError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text of a conversation, and where in it the template says that the model speaks."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """(start, end) of each `{% generation %}` block, in characters."""


def source(
    tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool = False, with_documents: bool = False
) -> str:
    """Return the template that a conversation, with tools or without, is rendered with; "" for none."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        wanted = ["tool_use"] * with_tools + ["rag"] * with_documents + ["default"]
        template = next((template[name] for name in wanted if template.get(name)), None)
    return template or ""


def names_role(template: str, role: str) -> bool:
    """Return whether the text of a template names `role`."""
    return f"'{role}'" in template or f'"{role}"' in template


def known_role(template: str, role: str) -> str:
    """Return `role`, or what stands for it in a template without it: the system for the developer."""
    stands_for = {"developer": "system", "function": "tool"}.get(role)
    return role if stands_for is None or names_role(template, role) else stands_for


def call_arguments(value: Any) -> Mapping[str, Any]:
    """Return the arguments of a call as templates get them: an object, which holds what is none."""
    return value if isinstance(value, Mapping) else {"arguments": value}


@lru_cache(maxsize=64)
def marks_answers(template: str) -> bool:
    """Return whether a template has `{% generation %}` blocks: it says itself what the model writes."""
    import jinja2

    try:
        lexer = jinja2.Environment(autoescape=True)
        tokens = [token for token in lexer.lex(template) if token[1] != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return False
    return any(
        before[1] == "block_begin" and after[1:] == ("name", "generation")
        for before, after in pairwise(tokens)
    )


def render(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions) -> str:
    """Return the text of a conversation; TemplateRefusedError for what the template refuses."""
    template = source(tokenizer, with_tools=bool(options.tools))
    try:
        return str(
            tokenizer.apply_chat_template(
                _with_arguments_for(template, turns),
                tools=options.tools or None,  # type: ignore[arg-type]  # the stub knows lists of one kind only
                documents=options.documents,
                tokenize=False,
                add_generation_prompt=options.begins_answer and not options.continues_last,
                continue_final_message=options.continues_last,
                **options.variables,
            )
        )
    except Exception as error:  # templates refuse roles, orders and variables by raising anything
        raise _refusal(error) from None


def render_marked(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions
) -> Rendering:
    """Return the text that `render` does, with its `{% generation %}` blocks; TemplateRefusedError alike."""
    template = source(tokenizer, with_tools=bool(options.tools))
    try:
        texts, blocks = _jinja(
            template,
            _without_nulls(_with_arguments_for(template, turns)),
            tools=options.tools or None,
            documents=options.documents,
            return_assistant_tokens_mask=True,
            add_generation_prompt=options.begins_answer,
            **{**tokenizer.special_tokens_map, **options.variables},
        )
    except Exception as error:
        raise _refusal(error) from None
    return Rendering(texts[0], tuple((start, end) for start, end in blocks[0]))


def _refusal(error: Exception) -> Failure:
    """Return what `error`, raised by a template, is: ConfigError for one that is no template at all."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return ConfigError(
            f"the chat template is broken at line {error.lineno}: {one_line(error.message, 200)}"
        )
    return TemplateRefusedError(one_line(error, 200))


def _jinja(template: str, turns: list[Turn], **arguments: Any) -> Any:
    """Return transformers' ([text], [blocks]) of one conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([turns], chat_template=template, **arguments)


def _without_nulls(turns: Sequence[Turn]) -> list[Turn]:
    """Return `turns` as transformers gives them to templates, which handle a missing key better than None."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _with_arguments_for(template: str, turns: Sequence[Turn]) -> list[Turn]:
    """Return `turns` with the arguments of calls as the template takes them: objects, or their JSON text."""
    if not any(turn.get("tool_calls") for turn in turns) or not takes_text_arguments(template):
        return list(turns)
    return [
        {**turn, "tool_calls": [_with_text(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str | None):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def takes_text_arguments(template: str) -> bool:
    """Return whether a template writes the arguments of a call as they are: they must be JSON text."""
    return _features(template, ()).text_arguments


def features(
    tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool = False, with_documents: bool = False
) -> TemplateFeatures:
    """Return what the template renders that a conversation, with tools or documents or without, gets."""
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    template = source(tokenizer, with_tools=with_tools, with_documents=with_documents)
    return _features(template, tuple(sorted(special.items())))


@lru_cache(maxsize=64)
def _features(template: str, special: tuple[tuple[str, str], ...]) -> TemplateFeatures:
    if not template:
        return TemplateFeatures()
    tokens = {"bos_token": "", "eos_token": "", **dict(special)}

    def attempt(turns: list[Turn], *, begins_answer: bool = True, **variables: Any) -> str | None:
        try:
            texts, _ = _jinja(template, turns, add_generation_prompt=begins_answer, **tokens, **variables)
        except Exception:  # templates refuse by raising anything
            return None
        return str(texts[0])

    words, variables = _names(template)
    return probe(attempt, words=words, variables=variables, marks_answers=marks_answers(template))


def _names(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the texts in a template that may be names of roles, and the variables that it reads."""
    import jinja2
    import jinja2.meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    texts = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
    return frozenset(text for text in texts if text.isidentifier()), frozenset(
        jinja2.meta.find_undeclared_variables(tree)
    )
