"""Chat templates: what one renders, and the text of a conversation, the same for serving and for tuning.

Templates come from models, adapters and jobs, never from a request. Does not know requests, rows or token
ids. Start at `render`, then features.py.
"""

from runtime.chat_template.features import TemplateFeatures, Turn, opened_thought, system_with_tools
from runtime.chat_template.rendering import (
    Rendering,
    TemplateOptions,
    call_arguments,
    features,
    known_role,
    marks_answers,
    names_role,
    render,
    render_marked,
    source,
    takes_text_arguments,
)

__all__ = [
    "Rendering",
    "TemplateFeatures",
    "TemplateOptions",
    "Turn",
    "call_arguments",
    "features",
    "known_role",
    "marks_answers",
    "names_role",
    "opened_thought",
    "render",
    "render_marked",
    "source",
    "system_with_tools",
    "takes_text_arguments",
]
