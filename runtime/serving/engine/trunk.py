"""The way of a step's flat tokens through a model: embedding, layers, last norm, head.

In place of transformers' own `forward` for the families alike: its checks, masks and hooks cost 2 to 4 ms a
step on a CPU. Does not know attention or adapters (blocks.py, lora.py). Start at `Trunk.run`.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from runtime.serving.engine.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trunk:
    """Runs a model whose layers are: norm, attention, add, norm, MLP, add."""

    def __init__(self, model: "PreTrainedModel") -> None:
        decoder: Any = model.get_decoder()
        self._embed: nn.Module = decoder.embed_tokens
        self._angles: nn.Module = decoder.rotary_emb
        self._layers = [
            (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
            for layer in decoder.layers
        ]
        self._norm: nn.Module = decoder.norm
        self._head = model.get_output_embeddings()

    def run(self, batch: Batch) -> Tensor:
        """Return logits (C, V) of the batch's chosen tokens; (0, 1) when there are none."""
        hidden: Tensor = self._embed(batch.ids)  # (1, N, hidden)
        angles = self._angles(hidden, batch.positions)
        update = None
        for before, attention, after, mlp in self._layers:
            hidden, normed = before.after(hidden, update)
            hidden, normed = after.after(hidden, attention(normed, angles)[0])
            update = mlp(normed)
        if not batch.chosen.numel():  # all tokens are the middle of prompts
            return hidden.new_empty(0, 1)
        # every step runs its last norm on the chosen tokens alone
        last = hidden[0, batch.chosen]
        if update is not None:
            last += update[0, batch.chosen]
        logits: Tensor = self._head(self._norm(last))
        return logits
