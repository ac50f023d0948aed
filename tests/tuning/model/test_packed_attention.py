"""Packed rows do not see each other: losses and gradients are those of separate rows, family by family."""

from typing import Any

import numpy as np
import pytest
import torch

from runtime import families
from runtime.tuning.data.batching import IGNORE, collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import packed_attention
from tests.families import PACKED
from tests.tuning.tiny_models import some_rows, tiny_model


def separate_loss(model: Any, rows: list[TokenizedSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of each row alone, by transformers itself, and the gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.loss_mask)[None], ids, IGNORE)
        labels[:, 0] = IGNORE
        count = int((labels != IGNORE).sum())
        if count:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * count
    total.backward()
    return float(total.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", [*PACKED, "falcon"])
def test_packed_and_padded_rows_equal_separate_rows(family: str) -> None:
    model = tiny_model(family, attention="eager")
    model.train(mode=False)
    rows = some_rows(6)
    expected, gradients = separate_loss(model, rows)
    for layout in ("packed", "sorted") if family in PACKED else ("sorted",):
        packed_attention.register()
        model.set_attn_implementation(packed_attention.NAME if layout == "packed" else "sdpa")
        model.zero_grad()
        loss = batch_loss(model, collate(rows, layout, pad_id=0), "cpu")  # type: ignore[arg-type]
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5)
        model.set_attn_implementation("eager")


def test_every_packed_family_was_compared() -> None:
    assert set(PACKED) == {name for name, family in families.FAMILIES.items() if family.packed}
