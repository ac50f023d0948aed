"""A small longrope model, and prompts; tests/families.py has a model of each family."""

import random
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.families import SIZES, vary


def some_prompts(*lengths: int, vocabulary: int = 128) -> list[tuple[int, ...]]:
    draw = random.Random(1)
    return [tuple(draw.randrange(3, vocabulary) for _ in range(length)) for length in lengths]


def longrope_model() -> Any:
    """Phi-4-mini's shape, 64 positions originally and 512 now; both sets of factors change its answers."""
    torch.manual_seed(0)
    draw = torch.rand(2, 4).tolist()
    rope = {
        "rope_type": "longrope", "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
        "short_factor": [1 + x for x in draw[0]], "long_factor": [2 + 6 * x for x in draw[1]],
    }  # fmt: skip
    config = transformers.Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=rope)
    return vary(AutoModelForCausalLM.from_config(config).eval())
