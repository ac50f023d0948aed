"""Noise on the embeddings of training passes: NEFTune (arXiv:2310.05914), by the length of each document.

transformers scales the noise by the width of a pass, which in packed rows is that of all documents together.
Does not know trainers. B rows, T tokens, E width of the hidden states. Start at `EmbeddingNoise.within`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from runtime.transfers import to_device
from runtime.tuning.data.batching import MicroBatch


class EmbeddingNoise:
    """Adds noise of `alpha` to what a model's embedding layer returns, within `within` only."""

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None
        if alpha:
            model.get_input_embeddings().register_forward_hook(self._add)

    @contextlib.contextmanager
    def within(self, batch: MicroBatch) -> Iterator[None]:
        """Within: the embeddings of `batch` are noisy."""
        if self.alpha:
            self._lengths = _lengths(batch)
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, _module: Any, _args: Any, embeddings: Tensor) -> Tensor | None:
        """embeddings (B, T, E); each number of a document changes by up to alpha / sqrt(its tokens · E)."""
        if self._lengths is None:
            return None
        most = self.alpha * (to_device(self._lengths, embeddings.device) * embeddings.shape[-1]).rsqrt()
        noise = torch.rand_like(embeddings).mul_(2).sub_(1)
        return embeddings + noise * most[..., None].to(embeddings.dtype)


def _lengths(batch: MicroBatch) -> Tensor:
    """Return the tokens of each token's document: (1, T) of a pack, (B, 1) of padded rows."""
    if batch.document_lengths:
        lengths = torch.tensor(batch.document_lengths, dtype=torch.float32)
        return lengths.repeat_interleave(lengths.long())[None]
    return batch.inputs["attention_mask"].sum(dim=1, keepdim=True).float()
