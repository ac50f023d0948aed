"""Modules over flat tokens compute what transformers' own do."""

import pytest
import torch

from runtime.serving.engine.layers import rotate


@pytest.mark.parametrize("size", [16, 8])
def test_rotation_is_that_of_transformers(size: int) -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    angle = torch.randn(1, 5, size // 2).repeat(1, 1, 2)
    expected, _ = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    rotated = rotate(q[0].transpose(0, 1), angle.cos(), angle.sin())
    torch.testing.assert_close(rotated.transpose(0, 1)[None], expected)
