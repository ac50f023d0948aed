"""The output layer and its loss as one operation, against double precision."""

import pytest
import torch
from torch import nn

from runtime.tuning.data.batching import IGNORE
from runtime.tuning.model import fused_loss
from runtime.tuning.model.fused_loss import LabelledTokens


def test_the_head_is_nearer_to_double_precision_than_a_float32_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 4 * 50_000 * 7)  # 20 labels in three chunks
    torch.manual_seed(0)
    layer = nn.Linear(32, 50_000).requires_grad_(False)
    layer.weight.data.mul_(40)
    labels = torch.randint(0, 50_000, (2, 10))
    labels[0, 3:6] = IGNORE
    hidden = torch.randn(2, 10, 32, requires_grad=True)
    head = fused_loss.LossHead(layer)
    indices = torch.tensor([n for n, label in enumerate(labels.flatten().tolist()) if label != IGNORE])
    with head.expecting(LabelledTokens(indices, labels.flatten()[indices])):
        loss = head(hidden)
    (to_ours,) = torch.autograd.grad(loss * 0.5, hidden)
    wide = hidden.double()
    logits = wide @ layer.weight.double().t() + layer.bias.double()
    exact = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    (to_exact,) = torch.autograd.grad(exact * 0.5, hidden)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=3e-7)
    torch.testing.assert_close(to_ours, to_exact, rtol=1e-4, atol=1e-5)
    assert not to_ours[0, 3:6].any()
    assert head(hidden).shape == (2, 10, 50_000)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_smoothed_target_is_spread_over_the_vocabulary(share: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 50).requires_grad_(False)
    labels = torch.randint(0, 50, (1, 8))
    hidden = torch.randn(1, 8, 16, requires_grad=True)
    head = fused_loss.LossHead(layer)
    with head.expecting(LabelledTokens(torch.arange(8), labels.flatten(), share)):
        loss = head(hidden)
    exact = nn.functional.cross_entropy(layer(hidden)[0], labels[0], reduction="sum", label_smoothing=share)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(exact, hidden))
