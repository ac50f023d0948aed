"""Text generation: token ids in, token ids out. `protocol` says what an engine is; `create` makes one."""

from typing import TYPE_CHECKING

from runtime import models
from runtime.serving.engine.protocol import Engine
from runtime.serving.settings import ServeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def create(config: ServeConfig, model: "PreTrainedModel") -> Engine:
    """Return a running engine over `model`, already on its device and in evaluation mode."""
    from runtime.serving.engine.plain import PlainEngine

    stated = models.context_tokens(model.config)
    context_tokens = min(stated, config.limits.context_tokens or stated)
    return PlainEngine(model, context_tokens=context_tokens, queue=config.limits.queue)
