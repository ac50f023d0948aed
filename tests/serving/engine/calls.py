"""Requests to engines, answers as lists, and what transformers' own generate returns."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from runtime import adapters
from runtime.model_source import ModelSource
from runtime.serving.engine.engine import BatchingEngine
from runtime.serving.engine.protocol import Engine, Request, Sampling, Token

WRONG_TOKEN = 3
"""The token of a wrong draft, unless a test has another."""

PROMPT = (5, 17, 230, 41, 9)


SOURCE = ModelSource(name="tiny", repository="someone/tiny")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def save_adapter(base: Path, folder: Path, *, rank: int, targets: list[str], seed: int = 0) -> None:
    """Save a LoRA adapter for the model in `base`, with weights that change every answer."""
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapters.save(model, folder, source=SOURCE)


def make_request(
    prompt: tuple[int, ...] = PROMPT,
    *,
    adapter: str | None = None,
    id: str = "1",  # noqa: A002
    **sampling: Any,
) -> Request:
    return Request(prompt, Sampling(**{"max_new_tokens": 16} | sampling), adapter=adapter, id=id)


async def collect(tokens: AsyncIterator[Token]) -> tuple[list[int], str | None]:
    ids: list[int] = []
    async for token in tokens:
        if token.id is None:
            return ids, token.finish_reason
        ids.append(token.id)
    raise AssertionError("no end")


def run(engine: Engine, *requests: Request) -> list[tuple[list[int], str | None]]:
    async def all_of_them() -> list[tuple[list[int], str | None]]:
        return await asyncio.gather(*(collect(engine.submit(request)) for request in requests))

    return asyncio.run(all_of_them())


async def tokens_of(engine: Engine, request: Request) -> list[Token]:
    return [token async for token in engine.submit(request)]


def score(engine: Engine, *requests: Request) -> list[list[Token]]:
    async def all_of_them() -> list[list[Token]]:
        return await asyncio.gather(*(tokens_of(engine, request) for request in requests))

    return asyncio.run(all_of_them())


def scoring(prompt: tuple[int, ...], **more: Any) -> Request:
    wanted = {"top_logprobs": 2, "prompt_logprobs": True, "max_new_tokens": 1}
    return make_request(prompt, **(wanted | more))


def assert_scored(tokens: list[Token], prompt: tuple[int, ...], model: Any, *, top: int = 2) -> None:
    """Check what came with the first token against the model's own forward."""
    assert tokens[0].start is not None
    found = tokens[0].start.prompt
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    assert tuple(token.id for token in found) == prompt
    assert (found[0].logprob, found[0].top) == (None, ())
    for position, token in enumerate(found[1:]):
        assert token.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)
        best = expected[position].topk(top).values.tolist() if top else []
        assert [logprob for _, logprob in token.top] == pytest.approx(best, abs=1e-4)


def run_at_once(engine: BatchingEngine, *requests: Request) -> list[tuple[list[int], str | None]]:
    """Return the answers to requests that the engine finds in its queue together."""

    async def all_of_them() -> list[tuple[list[int], str | None]]:
        holding, submitted = threading.Event(), threading.Event()

        def hold() -> None:
            holding.set()
            submitted.wait()

        held = threading.Thread(target=lambda: engine._queue.call(hold))
        held.start()
        holding.wait()
        answers = [engine.submit(request) for request in requests]
        submitted.set()
        held.join()
        return await asyncio.gather(*map(collect, answers))

    return asyncio.run(all_of_them())


def generate(
    model: Any, prompt: tuple[int, ...] = PROMPT, *, max_new_tokens: int = 16, **options: Any
) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=None, pad_token_id=2, **options,
    )  # fmt: skip
    return list(made[0, len(prompt) :].tolist())


class Oracle:
    """Drafts from known answers with every fifth token wrong, and wrong tokens where no answer is known."""

    def __init__(self) -> None:
        self.known: list[tuple[int, ...]] = []
        """Prompts with their answers."""
        self.wrong = WRONG_TOKEN

    def draft(self, ids: list[int], *, most: int) -> tuple[int, ...]:
        """Stand in for `PromptLookup.draft`."""
        if most <= 0:
            return ()
        for known in self.known:
            if known[: len(ids)] == tuple(ids):
                true = known[len(ids) : len(ids) + most]
                return tuple(self.wrong if (len(ids) + n) % 5 == 0 else id_ for n, id_ in enumerate(true))
        return (self.wrong, self.wrong)[:most]
