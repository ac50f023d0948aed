"""Rows of random tokens, and random models to compute with them."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from runtime.tuning.data.tokenize import TokenizedSequence
from tests.families import config_of


def tiny_model(family: str, *, attention: str) -> Any:
    """Return a random model of `family`, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family), attn_implementation=attention)


def some_rows(count: int, seed: int = 0) -> list[TokenizedSequence]:
    """Return rows of 3 to 39 random tokens, of which about half are labelled; of the first, the last only."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(3, 40, count)
    return [
        TokenizedSequence(
            generator.integers(3, 100, size).astype(np.int32),
            generator.random(size) < 0.5 if number else _last_only(size),
        )
        for number, size in enumerate(sizes)
    ]


def _last_only(size: int) -> Any:
    flags = np.zeros(size, dtype=np.bool_)
    flags[-1] = True
    return flags
