"""The output layer and the loss as one operation: logits exist for a few hundred tokens at a time.

A vocabulary's logits, their log-softmax and its gradient are the largest tensors of a small model's step.
Here one buffer holds them in turn, and the gradient of the hidden states is made at once, since the layer
is frozen. Does not know models. N learnt tokens, V vocabulary. Start at `LossHead`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from runtime.tuning.batches import IGNORE

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "olmo2", "smollm3"})
"""Model types whose logits are what the output layer returns, neither scaled nor capped."""
CHUNK_BYTES = 128 << 20
"""Of float32 logits at a time."""


class LossHead:
    """The `forward` of an output layer: its summed loss while labels are expected, else its logits."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.labels: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.labels is None:
            return type(self.layer).forward(self.layer, hidden)
        return _Loss.apply(hidden, self.labels, self.layer.weight, self.layer.bias)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def expecting(self, labels: Tensor) -> Iterator[None]:
        """Within: the layer returns the loss of its inputs (B, N, features) against labels (B, N)."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


def install(model: Any) -> bool:
    """Let `model`'s output layer compute the loss, where its family and the layer allow; say whether."""
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and not any(weight.requires_grad for weight in layer.parameters())
    if model.config.model_type not in FAMILIES or not plain:
        return False
    layer.forward = LossHead(layer)
    return True


def find(model: nn.Module) -> LossHead | None:
    """Return what `install` put into `model`, under whatever it is wrapped in."""
    heads = (module.__dict__.get("forward") for module in model.modules())
    return next((head for head in heads if isinstance(head, LossHead)), None)


class _Loss(torch.autograd.Function):
    """Cross-entropy in float32, summed over the labels that are not IGNORE."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden (B, N, features), labels (B, N)."""
        counted = labels.flatten() != IGNORE
        rows, wanted = hidden.flatten(0, -2)[counted], labels.flatten()[counted]
        needed = ctx.needs_input_grad[0]
        to_rows = torch.empty_like(rows) if needed else None
        total = torch.zeros((), device=hidden.device)
        size = max(1, CHUNK_BYTES // 4 // len(weight))
        logits = torch.empty(min(size, len(rows)), len(weight), device=hidden.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            total += _chunk(rows[part], wanted[part], weight, bias, logits)
            if to_rows is not None:
                to_rows[part] = logits[: len(rows[part])].to(weight.dtype) @ weight
        if to_rows is not None:
            ctx.save_for_backward(to_rows, counted)
            ctx.shape = hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """gradient () of the sum."""
        to_rows, counted = ctx.saved_tensors
        whole = to_rows.new_zeros(ctx.shape)
        whole.view(len(counted), -1)[counted] = (to_rows * gradient).to(to_rows.dtype)
        return whole, None, None, None


def _chunk(rows: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> Tensor:
    """Return the loss of `rows`, and leave its gradient by their logits in the first rows of `logits`."""
    logits = logits[: len(rows)]
    if rows.dtype == weight.dtype == torch.float32:
        torch.mm(rows, weight.t(), out=logits)
    else:
        logits.copy_(rows.to(weight.dtype) @ weight.t())
    if bias is not None:
        logits += bias
    places = wanted[:, None]
    logits -= logits.amax(dim=1, keepdim=True)
    right = logits.gather(1, places)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    logits.div_(sums).scatter_add_(1, places, torch.full_like(right, -1.0))
    return (sums.log_() - right).sum()
