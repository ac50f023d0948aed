"""NEFTune's noise: as large as the paper has it for each document, and in training passes only."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from runtime.tuning.data.batching import collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.model.embedding_noise import EmbeddingNoise

WIDTH = 64


class Embedded(nn.Module):
    """As much of a model as has embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(10, WIDTH).requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.layer


def row(tokens: int) -> TokenizedSequence:
    return TokenizedSequence(np.ones(tokens, dtype=np.int32), np.ones(tokens, dtype=np.bool_))


@pytest.mark.parametrize("layout", ["packed", "sorted"])
def test_noise_is_scaled_by_the_length_of_each_document(layout: Literal["packed", "sorted"]) -> None:
    torch.manual_seed(0)
    model = Embedded()
    noise = EmbeddingNoise(model, 5.0)
    batch = collate([row(100), row(4)], layout, pad_id=0)
    ids = batch.inputs["input_ids"]
    clean = model.layer(ids)
    with noise.within(batch):
        added = (model.layer(ids) - clean).abs()
    long, short = (added[0, :100], added[0, 100:]) if layout == "packed" else (added[0], added[1, :4])
    for part, tokens in ((long, 100), (short, 4)):
        most = 5.0 / (tokens * WIDTH) ** 0.5
        assert float(part.max()) == pytest.approx(most, rel=0.05)
        assert float(part.max()) <= most * 1.0001
    assert torch.equal(model.layer(ids), clean)
