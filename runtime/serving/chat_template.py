"""What a request may say about the rendering of its conversation, and the rendering.

Templates come from the model and never from a request; transformers renders them in Jinja's immutable
sandbox. A request's variables cannot stand for what the template gets from elsewhere. Does not know HTTP or
token ids. Start at `render`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
"""One message of a conversation as chat templates know it."""

MOST_VARIABLES = 32
LONGEST_VARIABLES = 8192
"""Characters of JSON."""
_GIVEN = {
    "conversation", "conversations", "messages", "self", "kwargs", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace", "raise_exception", "strftime_now", "loop", "caller", "varargs",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
}  # fmt: skip
"""Names that templates get from transformers and Jinja, beside those of `apply_chat_template`."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How one conversation is rendered."""

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template may read."""
    begins_answer: bool = True
    """Whether the prompt ends where the assistant begins to speak."""
    continues_last: bool = False
    """Whether the prompt ends with the text of the last message, which the answer continues."""
    adds_special: bool = False
    """Whether the tokenizer's opening tokens come before what the template writes."""


def check_variables(tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any], param: str) -> None:
    """Raise RequestError, naming the field `param`, for variables that a request may not set."""
    if len(variables) > MOST_VARIABLES or len(json.dumps(variables)) > LONGEST_VARIABLES:
        raise RequestError(
            f"'{param}' may have {MOST_VARIABLES} entries and {LONGEST_VARIABLES} characters of JSON",
            param=param,
        )
    taken = _GIVEN | _parameters() | tokenizer.special_tokens_map.keys()
    for name in variables:
        if name in taken or not name.isidentifier() or name.startswith("_"):
            raise RequestError(f"'{param}' may not set '{name[:64]}'", param=param)


def render(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], options: TemplateOptions) -> str:
    """Return the text of a conversation; RequestError for what the template refuses."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns),
                tools=options.tools,  # type: ignore[arg-type]  # the stub knows lists of one kind only
                documents=options.documents,
                tokenize=False,
                add_generation_prompt=options.begins_answer and not options.continues_last,
                continue_final_message=options.continues_last,
                **options.variables,
            )
        )
    except Exception as error:  # templates refuse roles, orders and variables by raising anything
        reason = one_line(error, 200)
        raise RequestError(
            f"the model's chat template refuses these messages: {reason}", param="messages"
        ) from None


@cache
def _parameters() -> frozenset[str]:
    """Return the names of transformers' own parameters of rendering."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    return frozenset(name for function in functions for name in inspect.signature(function).parameters)
