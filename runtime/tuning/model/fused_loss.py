"""The output layer and the cross-entropy as one operation, which never holds all logits at a time.

The layer's `forward` is replaced: while labels are expected it returns the summed loss, else its logits.
Does not know LoRA, batches or trainers. B rows, N columns with a label, M labelled tokens of all rows,
E width of the hidden states, V vocabulary. Start at `install`, then `LossHead`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime import families

CHUNK_BYTES = 128 << 20
"""Of float32 logits at a time."""


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """What the loss counts. A mask would do, but its sum is the size of the result: the host would wait."""

    indices: Tensor
    """(M,) into the flattened inputs (B · N, E)."""
    targets: Tensor
    """(M,) the label of each."""
    smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary."""


class LossHead:
    """The `forward` of an output layer: its summed loss while labels are expected, else its logits."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.labelled: LabelledTokens | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.labelled is None:
            return type(self.layer).forward(self.layer, hidden)
        return _Loss.apply(hidden, self.labelled, self.layer.weight, self.layer.bias)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def expecting(self, labelled: LabelledTokens) -> Iterator[None]:
        """Within: the layer returns the loss of its inputs (B, N, E) at the labelled tokens."""
        self.labelled = labelled
        try:
            yield
        finally:
            self.labelled = None


def install(model: Any) -> bool:
    """Let `model`'s output layer compute the loss; False where its family or the layer does not allow it."""
    layer = model.get_output_embeddings()
    plain = type(layer) is nn.Linear and not any(weight.requires_grad for weight in layer.parameters())
    if not families.find(model.config.model_type).plain_logits or not plain:
        return False
    layer.forward = LossHead(layer)
    return True


def loss_head(model: nn.Module) -> LossHead | None:
    """Return what `install` put into `model`, under whatever it is wrapped in."""
    heads = (module.__dict__.get("forward") for module in model.modules())
    return next((head for head in heads if isinstance(head, LossHead)), None)


class _Loss(torch.autograd.Function):
    """Cross-entropy in float32, summed over the labelled tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labelled: LabelledTokens, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """hidden (B, N, E), weight (V, E), bias (V,); returns a scalar."""
        indices, targets = labelled.indices, labelled.targets
        states = hidden.flatten(0, -2).index_select(0, indices)  # (M, E)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=hidden.device)
        size = max(1, CHUNK_BYTES // 4 // len(weight))
        logits = torch.empty(min(size, len(states)), len(weight), device=hidden.device)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            chunk = LabelledTokens(indices[part], targets[part], labelled.smoothing)
            total += _chunk_loss(states[part], chunk, weight, bias, logits)
            if grad_states is not None:
                grad_states[part] = logits[: len(states[part])].to(weight.dtype) @ weight
        if grad_states is not None:
            ctx.save_for_backward(grad_states, indices)
            ctx.shape = hidden.shape
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """gradient () of the sum."""
        grad_states, indices = ctx.saved_tensors
        grad_hidden = grad_states.new_zeros(ctx.shape)
        own = (grad_states * gradient).to(grad_states.dtype)
        grad_hidden.view(-1, ctx.shape[-1]).index_copy_(0, indices, own)
        return grad_hidden, None, None, None


def _chunk_loss(
    states: Tensor, labelled: LabelledTokens, weight: Tensor, bias: Tensor | None, logits: Tensor
) -> Tensor:
    """Return the loss of `states`, and leave its gradient by their logits in the first rows of `logits`."""
    logits = logits[: len(states)]
    if states.dtype == weight.dtype == torch.float32:
        torch.mm(states, weight.t(), out=logits)
    else:
        logits.copy_(states.to(weight.dtype) @ weight.t())
    if bias is not None:
        logits += bias
    columns, share = labelled.targets[:, None], labelled.smoothing
    logits -= logits.amax(dim=1, keepdim=True)
    target_logits = logits.gather(1, columns)
    if share:
        target_logits = torch.lerp(target_logits, logits.mean(dim=1, keepdim=True), share)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    logits.div_(sums).scatter_add_(1, columns, torch.full_like(target_logits, share - 1.0))
    if share:
        logits -= share / logits.shape[1]
    return (sums.log_() - target_logits).sum()
