"""Log probabilities of prompts: those of the model's own forward, whatever runs beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from runtime.errors import UnavailableError
from runtime.memory.pool import scored_tokens
from runtime.serving.engine import prompt_scores
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.kv_pool import LayerKinds
from runtime.serving.engine.protocol import Engine
from tests.families import model_of
from tests.serving.engine.calls import assert_scored, load, make_request, run, score, scoring
from tests.serving.engine.models import some_prompts

LONG = 3 * scored_tokens(1) + 5
"""Tokens of a prompt whose scores take several steps."""


@pytest.fixture(scope="module", params=["batching", "overlapping", "simple"])
def engine(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> Iterator[Engine]:
    """Each of the engines that run a model here, with two adapters."""
    made: Engine
    if request.param == "simple":
        made = SimpleEngine(load(tiny_llama_dir), context_tokens=256, max_waiting=16)
    else:
        limits = EngineLimits(max_sequences=4, context_tokens=256, max_waiting=16)
        made = BatchingEngine(load(tiny_llama_dir), limits, overlap=request.param == "overlapping")
    for name, folder in adapter_dirs.items():
        made.add_adapter(name, folder)
    yield made
    made.close()


def test_prompts_are_scored_side_by_side_with_ordinary_requests(engine: Engine, tiny_llama_dir: Path) -> None:
    model = load(tiny_llama_dir)
    prompts = some_prompts(2, LONG, 1, 40, 33, 9)
    plain = [make_request(prompt, id=f"plain-{n}", max_new_tokens=8) for n, prompt in enumerate(prompts[:3])]
    alone = [run(engine, request)[0] for request in plain]
    scored = [scoring(prompt, id=f"scored-{n}") for n, prompt in enumerate(prompts)]
    answers = score(engine, *scored, *plain)
    for tokens, prompt in zip(answers, prompts, strict=False):
        assert_scored(tokens, prompt, model)
    ordinary = answers[len(prompts) :]
    assert [[token.id for token in tokens[:-1]] for tokens in ordinary] == [ids for ids, _ in alone]
    assert not any(tokens[0].start and tokens[0].start.prompt for tokens in ordinary)


def test_what_is_cached_is_computed_again_for_its_scores(engine: Engine, tiny_llama_dir: Path) -> None:
    (prompt,) = some_prompts(80)
    run(engine, make_request(prompt))
    (tokens,) = score(engine, scoring(prompt))
    assert_scored(tokens, prompt, load(tiny_llama_dir))
    assert tokens[0].start is not None
    assert tokens[0].start.cached_tokens == 0


def test_no_new_token_ends_with_the_prompt(engine: Engine, tiny_llama_dir: Path) -> None:
    (prompt,) = some_prompts(50)
    (tokens,) = score(engine, scoring(prompt, max_new_tokens=0, top_logprobs=0))
    assert [(token.id, token.finish_reason) for token in tokens] == [(None, "length")]
    assert_scored(tokens, prompt, load(tiny_llama_dir), top=0)


def test_a_prompt_is_scored_under_its_adapter(
    engine: Engine, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    (prompt,) = some_prompts(45)
    names = [None, *adapter_dirs]
    answers = score(engine, *(scoring(prompt, adapter=name, id=str(n)) for n, name in enumerate(names)))
    for tokens, name in zip(answers, names, strict=True):
        model = load(tiny_llama_dir)
        if name is not None:
            model = PeftModel.from_pretrained(model, str(adapter_dirs[name])).eval()
        assert_scored(tokens, prompt, model)


def test_the_end_says_which_stop_id_was_chosen_and_how_likely_it_was(engine: Engine) -> None:
    (prompt,) = some_prompts(12)
    first = score(engine, make_request(prompt, top_logprobs=1))[0][0]
    (end,) = score(engine, make_request(prompt, top_logprobs=1, stop_ids=frozenset({first.id})))[0]
    assert (end.id, end.finish_reason, end.stop_id) == (None, "stop", first.id)
    assert end.logprob == pytest.approx(first.logprob)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_other_families_and_prompts_that_are_put_off_score_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    monkeypatch.setattr("runtime.serving.engine.scheduler.LEAST_ROOM", 1)
    monkeypatch.setattr("runtime.serving.engine.pool_map.LEAST_GROWTH", 2)
    monkeypatch.setattr("runtime.serving.engine.engine.PREFILL_ONLY_TOKENS", 24)
    monkeypatch.setattr("runtime.serving.engine.engine.CHUNK_TOKENS", 16)
    prompts = some_prompts(8, 12, 9, 30)
    windows = LayerKinds.of(model.config).windows
    positions = tuple(56 if window is None else 46 for window in windows)
    engine = BatchingEngine(model, EngineLimits(8, 56, 8, positions=positions))
    requests = [scoring(prompt, id=str(n), max_new_tokens=16) for n, prompt in enumerate(prompts)]
    answers = score(engine, *requests)
    preemptions = engine.stats().preemptions
    engine.close()
    reference = model_of(family)
    for tokens, prompt in zip(answers, prompts, strict=True):
        assert_scored(tokens, prompt, reference)
    assert preemptions, "no sequence was put off: proves nothing"


def test_nan_within_a_prompt_ends_the_request_instead_of_reaching_its_scores(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(following: Any, logits: torch.Tensor, *, alternatives: int) -> torch.Tensor:
        return pack(following, torch.full_like(logits, torch.nan), alternatives=alternatives)

    pack = prompt_scores.pack
    monkeypatch.setattr(prompt_scores, "pack", spoil)
    engine = BatchingEngine(load(tiny_llama_dir), EngineLimits(2, 128, 8))
    with pytest.raises(UnavailableError, match="NaN"):
        score(engine, scoring(some_prompts(20)[0]))
    engine.close()
