"""Text generation: token ids in, token ids out. `protocol` says what an engine is; `create` makes one."""

from typing import TYPE_CHECKING

from runtime.serving.engine.protocol import Engine
from runtime.serving.settings import ServeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FALLBACK_CONTEXT_TOKENS = 2048
"""Context of a model whose configuration does not state one."""


def create(config: ServeConfig, model: "PreTrainedModel") -> Engine:
    """Return a running engine over `model`, already on its device and in evaluation mode."""
    from runtime.serving.engine.plain import PlainEngine

    text = model.config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None) or FALLBACK_CONTEXT_TOKENS
    context_tokens = min(stated, config.limits.context_tokens or stated)
    return PlainEngine(model, context_tokens=context_tokens, queue=config.limits.queue)
