"""Adapters are cast once a step; and what else a layer of a packed pass launches (tests/bench/RESULTS.md)."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime.tuning.data.batching import collate
from runtime.tuning.data.tokenize import TokenizedSequence
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import adapter_matrices, fused_lora, fused_ops, lora, packed_attention
from runtime.tuning.settings import Lora
from tests.families import config_of
from tests.launches import Launches

FLASH, EFFICIENT = (9, 0), (7, 0)


def launches(family: str, layers: int, documents: int, capability: tuple[int, int]) -> int:
    """Return the launches of a second pass of a step: gradients add up, and the matrices are cast already."""
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    config = config_of(family, num_hidden_layers=layers)
    base = AutoModelForCausalLM.from_config(config).to(dtype)
    model = lora.attach(base, Lora(r=8)).train()
    packed_attention.register()
    base.set_attn_implementation(packed_attention.NAME)
    model.to("meta")
    row = TokenizedSequence(np.full(20, 5, np.int32), np.ones(20, np.bool_))
    with (
        fused_ops.fused_rotary(model),
        Launches(dtype) as seen,
        adapter_matrices.held(fused_lora.adapter_groups(model), dtype),
    ):
        for _ in range(2):
            seen.found.clear()
            batch_loss(model, collate([row] * documents, "packed", pad_id=0), "meta").backward()
    return seen.total


@pytest.mark.parametrize(
    ("family", "capability", "expected"),
    [("llama", FLASH, 98), ("llama", EFFICIENT, 104), ("phi3", FLASH, 85), ("phi3", EFFICIENT, 91)],
)  # fmt: skip
def test_a_layer_launches_as_much_for_one_document_as_for_32(
    family: str, capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the products' expansion of 4-bit weights: 3 more for each linear layer and direction."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    counts = [launches(family, layers, documents, capability) for layers in (1, 2) for documents in (1, 32)]
    assert (counts[2] - counts[0], counts[3] - counts[1]) == (expected, expected)


def test_adapters_are_cast_in_two_launches_whatever_their_number() -> None:
    base = AutoModelForCausalLM.from_config(config_of("llama")).to(torch.bfloat16)
    model = lora.attach(base, Lora(r=8, alpha=12)).to("meta")
    groups = fused_lora.adapter_groups(model)
    with Launches() as seen, adapter_matrices.held(groups, torch.bfloat16):
        pass
    assert set(seen.found) <= {"_foreach_mul", "_foreach_copy_"}
    assert seen.total == 2
