"""A compiler for the tiny tokenizer, and answers that nothing but their form decides."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import models
from runtime.model_source import ModelSource
from runtime.serving.engine.protocol import Grammar
from runtime.serving.structured_output.compiler import GrammarCompiler

END = 2


@pytest.fixture(scope="package")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return models.load_tokenizer(ModelSource(name="tiny", path=tiny_llama_dir))


@pytest.fixture(scope="package")
def shared_compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, frozenset({END}))
    yield made
    made.close()


@pytest.fixture
def answers(tokenizer: Any) -> Callable[..., list[str]]:
    """Return a function that gives the complete answers of some seeds: every allowed token is as likely."""

    def write(grammar: Grammar, *, seeds: int = 12, most: int = 150) -> list[str]:
        written = []
        for seed in range(seeds):
            draw, mask, ids = random.Random(seed), grammar.begin(), list[int]()
            for _ in range(most):
                allowed = np.frombuffer(mask.allowed(), np.uint8)
                ends = bool(allowed[END]) and draw.random() < 0.3
                token = END if ends else int(draw.choice(np.flatnonzero(allowed)))
                if token == END:
                    written.append(tokenizer.decode(ids))
                    break
                ids.append(token)
                mask.take(token)
        return written

    return write
