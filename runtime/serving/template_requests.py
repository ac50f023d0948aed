"""What a request may say about the rendering of its conversation (runtime/chat_template/).

A request's variables cannot stand for what the template gets from elsewhere. Does not know HTTP or token ids.
Start at `render`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from runtime import chat_template
from runtime.chat_template import TemplateOptions, Turn
from runtime.errors import RequestError, TemplateLimitError, TemplateLongError, TemplateRefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_VARIABLES = 32
LONGEST_VARIABLES = 8192
"""Characters of JSON."""
_GIVEN = {
    "conversation", "conversations", "messages", "self", "kwargs", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace", "raise_exception", "strftime_now", "loop", "caller", "varargs",
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
}  # fmt: skip
"""Names that templates get from transformers and Jinja, beside those of `apply_chat_template`."""


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
    """Return the text of a conversation; RequestError for what the template refuses, or takes too much for.

    TemplateLongError for a text of more than options.most_characters.
    """
    try:
        return chat_template.render(tokenizer, turns, options)
    except TemplateLongError:
        raise
    except TemplateLimitError as limit:
        raise RequestError(
            f"the model's chat template cannot render these messages: {limit}", param="messages"
        ) from None
    except TemplateRefusedError as refusal:
        raise RequestError(
            f"the model's chat template refuses these messages: {refusal}", param="messages"
        ) from None


@cache
def _parameters() -> frozenset[str]:
    """Return the names of transformers' own parameters of rendering."""
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    return frozenset(name for function in functions for name in inspect.signature(function).parameters)
