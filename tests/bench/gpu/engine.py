"""Step 5: the engine on Phi-3-mini's shape: equal lengths, random arrivals, drawing, adapters, first tokens.

One engine for each number of rows, so that the measured requests have the slots that were warmed up; the one
of 32 rows comes first and answers everything else too. Start at `run`.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.bench.gpu import models
from tests.bench.gpu.load import Load, Running, serving
from tests.bench.gpu.step import Context, Figures

ROWS = {"phi-3-mini": (32, 8, 1, 128), "tiny": (4, 1)}
"""The first one is also what requests arrive at."""
EQUAL = {"phi-3-mini": Load((552, 552), (96, 96)), "tiny": Load((40, 40), (12, 12))}
"""Prompt and new tokens: 600 positions in the middle."""
PROMPTS = {"phi-3-mini": (50, 1000), "tiny": (5, 60)}
ANSWERS = {"phi-3-mini": (32, 160), "tiny": (2, 10)}
SECONDS = {"phi-3-mini": 6.0, "tiny": 1.0}
CONTEXT_TOKENS = {"phi-3-mini": 2048, "tiny": 256}
LENGTHS = {"phi-3-mini": range(37, 37 + 50 * 29, 29), "tiny": range(5, 105, 2)}
"""50 lengths that no other prompt of a run has in this order."""
DRAWN = {"temperature": 0.7, "top_p": 0.95}
ADAPTERS = (4, 26)
"""A few and many: both are captured, and a step costs by those that it uses."""
RANK = 16


def run(context: Context) -> None:
    """Answer every load at the first number of rows, then equal lengths at the others."""
    for number, rows in enumerate(ROWS[context.shape]):
        if context.left_s() < 8:
            context.emit(f"{rows} rows", left_out=f"{context.left_s():.0f} s left, 8 needed")
            continue
        model = models.build(context)
        with serving(context, model, rows=rows, context_tokens=CONTEXT_TOKENS[context.shape]) as running:
            load = EQUAL[context.shape]
            context.case(f"{rows} equal rows", partial(_equal, context, running, rows, load), needs_s=3)
            if number == 0:
                _others(context, running, min(rows, running.engine.max_sequences))
        del model, running
        context.release()


def _others(context: Context, running: Running, rows: int) -> None:
    shape = context.shape
    arriving = Load(PROMPTS[shape], ANSWERS[shape])
    drawn = replace(arriving, sampling=DRAWN)
    seconds = SECONDS[shape]
    rate = context.case(
        f"rate of {rows} rows", lambda: {"requests_per_s": running.rate(rows, arriving)}, needs_s=5
    )
    for name, load in ((f"Poisson at {rows} rows", arriving), (f"Poisson at {rows} rows, drawn", drawn)):
        if rate:
            measured = partial(running.poisson, rate["requests_per_s"], load, seconds=seconds)
            context.case(name, measured, needs_s=2 * seconds)
    load = replace(EQUAL[shape], sampling=DRAWN)
    context.case(f"{rows} equal rows, drawn", lambda: _equal(context, running, rows, load), needs_s=3)
    for on in (False, True):
        with running.overlap(on=on):
            name = f"overlap {'on' if on else 'off'}"
            for load in (EQUAL[shape], replace(EQUAL[shape], sampling=DRAWN)):
                what = f"{rows} equal rows{', drawn' * bool(load.sampling)}, {name}"
                context.case(what, partial(_equal, context, running, rows, load), needs_s=3)
            if rate:
                measured = partial(running.poisson, rate["requests_per_s"], drawn, seconds=seconds / 2)
                context.case(f"Poisson at {rows} rows, drawn, {name}", measured, needs_s=seconds)
    context.case("first token", lambda: running.first_token(LENGTHS[shape]), needs_s=3)
    names: list[str] = []
    for count in ADAPTERS:
        context.case(
            f"{rows} equal rows, {count} adapters",
            partial(_adapted, context, running, rows, names=names, count=count),
            needs_s=5,
        )


def _adapted(context: Context, running: Running, rows: int, *, names: list[str], count: int) -> Figures:
    """Load adapters until there are `count`, and answer rows that have them in turn."""
    folder = _adapter(context)
    began, before = time.monotonic(), len(names)
    while len(names) < count:
        running.engine.add_adapter(f"adapter-{len(names)}", folder)
        names.append(f"adapter-{len(names)}")
    added_s = (time.monotonic() - began) / (len(names) - before)
    load = replace(EQUAL[context.shape], adapters=tuple(names))
    return _equal(context, running, rows, load) | {"s_per_adapter": added_s}


def _equal(context: Context, running: Running, rows: int, load: Load) -> Figures:
    figures = running.equal(rows, load)
    roof = running.roofline(context, rows, load.prompt[0] + load.new[0] / 2)
    share = figures["tokens_per_s"] / roof
    return {"roofline_share": share, **figures, "roofline_tokens_per_s": roof}


def _adapter(context: Context) -> Path:
    """Return a folder with a LoRA adapter of random weights on every linear layer."""
    from peft import LoraConfig, get_peft_model

    folder = context.scratch / "adapter"
    if not folder.exists():
        adapted = get_peft_model(
            models.without_weights(context),
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        weights = {
            name: (torch.randn(parameter.shape) * 0.01).to(context.dtype)
            for name, parameter in adapted.state_dict().items()
            if "lora_" in name
        }
        adapted.save_pretrained(str(folder), state_dict=weights)
    return folder
