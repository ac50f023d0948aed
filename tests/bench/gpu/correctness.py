"""Step 2: what the tuner and the engine compute here, against peft and transformers in float32 on the CPU.

The tuner's loss and every adapter gradient come out of its own trainer (packs, fused loss, fused LoRA, loss
scaler); the reference runs row by row on the same weights, 4-bit ones dequantised. The engine's greedy tokens
are held against the logits of the same model in float32. Start at `run`.
"""

import asyncio
import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from runtime.model_source import ModelSource
from runtime.serving.engine.create import create
from runtime.serving.engine.protocol import Engine, Request, Sampling
from runtime.serving.settings import Limits, ServeConfig
from tests.bench.gpu import models
from tests.bench.gpu.step import Context, Figures
from tests.bench.gpu.training import TrainingCase, compare
from tests.families import vary

PROMPT_TOKENS = (5, 23, 90, 150)
NEW_TOKENS = 24
MOST_GAP = 0.02
"""Of the largest logit: by so much the engine's token may be below the reference's best."""


@contextlib.contextmanager
def _flash(allowed: bool) -> Iterator[None]:
    """Within: torch takes FlashAttention only where `allowed`; without it as on a V100."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(before and allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def run(context: Context) -> None:
    """Compare everything; a GPU has more types and kernels to compare than a CPU."""
    cases = [
        *((TrainingCase(name), True) for name in models.TINY),
        (TrainingCase("llama", checkpointing=True), True),
        (TrainingCase("llama", bits=None), True),
    ]
    engines = [(name, "auto", True) for name in models.TINY]
    if context.device == "cuda":
        cases += [
            (TrainingCase("llama", dtype="float16"), True),
            (TrainingCase("llama", dtype="float16"), False),
            (TrainingCase("phi3", dtype="float16", checkpointing=True), False),
        ]
        engines += [("llama", "float16", False), ("longrope", "float16", False)]
    for case, flash in cases:
        with _flash(flash):
            context.case(f"tune {case.name}{_OFF[flash]}", partial(compare, context, case))
    for name, dtype, flash in engines:
        with _flash(flash):
            context.case(f"serve {name} {dtype}{_OFF[flash]}", partial(_served, context, name, dtype))


_OFF = {True: "", False: ", flash off"}


def _served(context: Context, name: str, dtype: str) -> Figures:
    """Return how the engine's greedy tokens differ from those of the same model in float32."""
    reference = vary(models.tiny(name))
    compute = context.dtype if dtype == "auto" else getattr(torch, dtype)
    reference = reference.to(compute).float()  # the weights that the engine has
    served = copy.deepcopy(reference).to(context.device, compute)
    config = ServeConfig(
        model=ModelSource(name="tiny"),
        served_name="m",
        limits=Limits(rows=len(PROMPT_TOKENS), context_tokens=256, queue=8),
    )
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (count,), generator=draw).tolist() for count in PROMPT_TOKENS]
    engine = create(config, served)
    try:
        together = asyncio.run(_answers(engine, prompts))
        alone = asyncio.run(_answers(engine, prompts[-1:]))  # with drafts, and its prompt in the cache
    finally:
        engine.close()
    pairs = [*zip(prompts, together, strict=True), (prompts[-1], alone[0])]
    return _differences(reference, pairs)


async def _answers(engine: Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    async def ask(prompt: list[int], number: int) -> list[int]:
        request = Request(tuple(prompt), Sampling(max_new_tokens=NEW_TOKENS), id=str(number))
        return [token.id async for token in engine.submit(request) if token.id is not None]

    return await asyncio.gather(*(ask(prompt, number) for number, prompt in enumerate(prompts)))


def _differences(model: Any, pairs: list[tuple[list[int], list[int]]]) -> Figures:
    """Return at which token the answers first leave the model's own, and by which logits.

    Each token is judged after the ones that the engine chose, so that one early difference hides none later.
    """
    first, gaps, tokens = None, [0.0], 0
    for prompt, answer in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        behind = (logits.max(dim=1).values - chosen) / logits.abs().max()
        tokens += len(answer)
        gaps.append(float(behind.max()))
        differing = (behind > 0).nonzero().flatten().tolist()
        if differing and (first is None or differing[0] < first):
            first = differing[0]
    expected = len(pairs) * NEW_TOKENS
    figures: Figures = {"tokens": tokens, "first_difference": first, "gap_share": max(gaps)}
    if max(gaps) > MOST_GAP or tokens != expected:
        figures["fault"] = f"{tokens} of {expected} tokens, one {max(gaps):.3g} of the largest logit behind"
    return figures
