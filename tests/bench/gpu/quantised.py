"""Step 7: decoding with 4-bit and 8-bit weights, and an engine whose memory runs out.

Memory is capped at little more than what the engine has, and one request has a prompt longer than that
allows: the others have to get their answers, and the engine has to live. Start at `run`.
"""

import asyncio
from functools import partial
from typing import Any

import torch

from runtime import hardware, models
from runtime.model_source import ModelSource, Quantization
from runtime.serving.engine.protocol import Request, Sampling
from tests.bench.gpu.load import Load, Running, serving
from tests.bench.gpu.models import build, grouped_config, saved
from tests.bench.gpu.step import Context, Figures

ROWS = {"phi-3-mini": (1, 8, 32), "tiny": (1, 4)}
EQUAL = {"phi-3-mini": Load((552, 552), (64, 64)), "tiny": Load((20, 20), (8, 8))}
CONTEXT_TOKENS = {"phi-3-mini": 1024, "tiny": 64}
LONG_TOKENS = {"phi-3-mini": 30000, "tiny": 300}
SHORT_TOKENS, ANSWER_TOKENS = 20, 40
SPARE_BYTES = 256 << 20
"""Memory that is left to the engine beside what it has."""


def run(context: Context) -> None:
    """Decode with each kind of weights at each number of rows, then let memory run out."""
    context.case("long prompt, memory capped", lambda: _capped(context), needs_s=5)
    for name, quantization in (("NF4", Quantization()), ("int8", Quantization(bits=8))):
        for rows in ROWS[context.shape]:
            context.case(
                f"{name}, {rows} equal rows",
                partial(_decoded, context, rows, quantization),
                needs_s=10,
            )


def _decoded(context: Context, rows: int, quantization: Quantization) -> Figures:
    """Return the speed of a quantised model, which is loaded as a server loads it."""
    folder, machine = saved(context), context.machine
    model: Any = models.load(
        ModelSource(name=str(folder), path=folder),
        hardware=machine,
        device=hardware.device(machine),
        quantization=quantization,
    )
    load = EQUAL[context.shape]
    tokens = CONTEXT_TOKENS[context.shape]
    with serving(context, model, rows=rows, context_tokens=tokens, quantization=quantization) as running:
        figures = running.equal(rows, load)
        roof = running.roofline(context, rows, load.prompt[0] + load.new[0] / 2)
    del model, running
    context.release()
    share = figures["tokens_per_s"] / roof
    return {"roofline_share": share, **figures, "roofline_tokens_per_s": roof}


def _capped(context: Context) -> Figures:
    """Return how a request that asks for too much ended, and what the others got."""
    model = build(context, grouped_config(context))
    long = LONG_TOKENS[context.shape]
    try:
        with serving(context, model, rows=4, context_tokens=long + 2 * ANSWER_TOKENS) as running:
            asyncio.run(_ask(running, long=0))  # what every later request needs is there before the cap
            capped = _cap(context)
            outcomes = asyncio.run(_ask(running, long=long))
            afterwards = asyncio.run(_ask(running, long=0))
            alive = running.engine.stats().alive
    finally:
        if context.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    answered = outcomes[1:].count("answered")
    figures: Figures = {
        "capped": capped,
        "long_prompt": outcomes[0],
        "others_answered": answered,
        "answered_afterwards": afterwards.count("answered"),
        "alive": alive,
    }
    if answered < len(outcomes) - 1 or afterwards != ["answered"] * len(afterwards) or not alive:
        figures["fault"] = "a request of which memory was no matter was not answered, or the engine is dead"
    return figures


def _cap(context: Context) -> bool:
    """Leave the engine little more memory than it has; False on a CPU."""
    if context.device == "cpu":
        return False
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + SPARE_BYTES) / total)
    return True


async def _ask(running: Running, *, long: int) -> list[str]:
    """Ask one long prompt, if any, once three short ones have begun; how each ended, the long first."""
    begun = asyncio.Event()

    async def ask(prompt: int, number: int) -> str:
        ids = tuple(3 + (number + position) % 400 for position in range(prompt))
        request = Request(ids, Sampling(max_new_tokens=ANSWER_TOKENS), id=f"{long} {number}")
        count = 0
        try:
            async for token in running.engine.submit(request):
                count += token.id is not None
                begun.set()
        except Exception as error:  # how it ended is what is asked
            begun.set()
            return f"{type(error).__name__} after {count} tokens"
        return "answered" if count == ANSWER_TOKENS else f"{count} tokens"

    short = [asyncio.create_task(ask(SHORT_TOKENS, number)) for number in range(1, 4)]
    await begun.wait()
    longest = [await ask(long, 0)] if long else []
    return [*longest, *await asyncio.gather(*short)]
