"""Rotary embeddings that depend on the length, chosen for each sequence (LongRoPE, arXiv:2402.13753).

transformers takes the factors for long contexts as soon as the longest sequence of a batch is long; here each
sequence has its own, so that an answer does not depend on the sequences beside it. Shapes: `N` flat tokens,
`d` rotary dims. Does not know requests. Start at `LongRope` and `short_tokens`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime.serving.engine.batch import StepContext

KNOWN = frozenset({"default", "linear", "dynamic", "yarn", "llama3", "longrope"})
"""Rope types tested sequence by sequence against `generate`.

"dynamic" stretches sequences longer than `max_position_embeddings`, and none is ever that long; the others
but longrope do not depend on the length.
"""


def refusal(config: Any) -> str | None:
    """Return why the rope of a text model with this configuration is not supported, or None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [each for each in parameters.values() if isinstance(each, dict)]
    types = {str(each.get("rope_type", "default")) for each in by_layer or [parameters]}
    if types - KNOWN:
        return f"rope type '{min(types - KNOWN)}' is not one it knows"
    return "longrope in some layers only" if by_layer and "longrope" in types else None


def short_tokens(config: Any) -> int | None:
    """Return up to how many positions a longrope model takes its short factors; None for all others."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    original = parameters.get("original_max_position_embeddings")
    return int(original or config.original_max_position_embeddings)


class LongRope(nn.Module):
    """In place of a longrope model's rotary embedding: each token has the factors of its sequence."""

    short: Tensor
    long: Tensor

    def __init__(self, source: Any, step: StepContext) -> None:
        super().__init__()
        self._step, self._scaling = step, float(source.attention_scaling)
        frequencies, device = ROPE_INIT_FUNCTIONS["longrope"], source.inv_freq.device
        beyond = (short_tokens(source.config) or 0) + 1
        self.register_buffer("short", frequencies(source.config, device)[0], persistent=False)
        self.register_buffer("long", frequencies(source.config, device, seq_len=beyond)[0], persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (1, N, d) of positions (1, N), in the type of x."""
        long = self._step.running.long
        factors = self.short if long is None else torch.where(long[:, None], self.long, self.short)
        half = position_ids[..., None].float() * factors  # (1, N, d / 2)
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * self._scaling).to(x.dtype), (angles.sin() * self._scaling).to(x.dtype)
