"""Chat templates: what one renders, and the text of a conversation, the same for serving and for tuning.

Templates come from models, adapters and jobs, never from a request, and run in processes that can be killed
(renderer.py). Does not know requests, rows or token ids. Start at `render`, then features.py.
"""

from runtime.chat_template.features import TemplateFeatures, Turn, opened_thought, system_with_tools
from runtime.chat_template.messages import call_arguments
from runtime.chat_template.rendering import (
    DEFAULT,
    Rendering,
    TemplateOptions,
    check,
    features,
    is_slow,
    marks_answers,
    render,
    render_marked,
    source,
)

__all__ = [
    "DEFAULT",
    "Rendering",
    "TemplateFeatures",
    "TemplateOptions",
    "Turn",
    "call_arguments",
    "check",
    "features",
    "is_slow",
    "marks_answers",
    "opened_thought",
    "render",
    "render_marked",
    "source",
    "system_with_tools",
]
