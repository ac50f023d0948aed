"""Every row once, the same plan on every rank, and packed rows that do not see each other."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from runtime import families
from runtime.tuning.data.batching import IGNORE, BatchPlan, collate, group, pack, partition
from runtime.tuning.data.tokenize import TokenizedRow
from runtime.tuning.loss import batch_loss
from runtime.tuning.model import packed_attention
from runtime.tuning.model.lora import evaluating
from tests.families import PACKED, config_of

lengths = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@given(lengths, st.integers(1, 5))
def test_ranks_partition_rows_none_twice_none_lost(sizes: list[int], world: int) -> None:
    shares = partition(range(len(sizes)), sizes, world)
    assert Counter(row for share in shares for row in share) == Counter(range(len(sizes)))
    loads = [sum(sizes[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@given(lengths, st.integers(400, 900))
def test_packs_and_groups_hold_every_row_within_the_budget(sizes: list[int], budget: int) -> None:
    rows = range(len(sizes))
    for arrange in (pack, group):
        arranged = arrange(rows, sizes, budget)
        assert sorted(row for content in arranged for row in content) == list(rows)
    assert all(sum(sizes[row] for row in content) <= budget for content in pack(rows, sizes, budget))
    assert all(max(sizes[r] for r in c) * len(c) <= budget for c in group(rows, sizes, budget))


@given(lengths, st.integers(1, 4), st.integers(1, 9))
def test_an_epoch_uses_every_row_once_over_all_ranks(sizes: list[int], world: int, step_rows: int) -> None:
    plan = BatchPlan(tuple(sizes), tuple(sizes), step_rows, 400, "packed", world=world)
    seen: Counter[int] = Counter()
    for rows in plan.steps(0):
        shares = [plan.rank_batch(rows, rank) for rank in range(world)]
        assert len({share.labelled_tokens for share in shares}) == 1
        seen.update(
            row for share in shares if not share.idle for batch in share.micro_batches for row in batch
        )
    assert seen == Counter(range(len(sizes)))
    assert len(list(plan.steps(0))) == plan.steps_per_epoch


def test_order_follows_seed_and_epoch() -> None:
    plan = BatchPlan((5,) * 40, (2,) * 40, 8, 64, "packed", seed=1)
    assert list(plan.steps(0)) == list(plan.steps(0))
    assert list(plan.steps(0)) != list(plan.steps(1))
    assert list(plan.steps(0)) != list(BatchPlan((5,) * 40, (2,) * 40, 8, 64, "packed", seed=2).steps(0))


def test_last_short_step_is_dropped_only_when_asked() -> None:
    assert BatchPlan((5,) * 10, (2,) * 10, 4, 64, "packed").steps_per_epoch == 3
    assert BatchPlan((5,) * 10, (2,) * 10, 4, 64, "packed", drop_last=True).steps_per_epoch == 2
    assert BatchPlan((5,) * 3, (2,) * 3, 4, 64, "packed", drop_last=True).steps_per_epoch == 1


def some_rows(count: int, seed: int = 0) -> list[TokenizedRow]:
    random = np.random.default_rng(seed)
    sizes = random.integers(3, 40, count)
    return [
        TokenizedRow(
            random.integers(3, 100, size).astype(np.int32),
            random.random(size) < 0.5 if number else _one(size),
        )
        for number, size in enumerate(sizes)
    ]


def _one(size: int) -> Any:
    flags = np.zeros(size, dtype=np.bool_)
    flags[-1] = True
    return flags


def plain_loss(model: Any, rows: list[TokenizedRow]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of each row alone, by transformers itself, and the gradients."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.loss_mask)[None], ids, IGNORE)
        labels[:, 0] = IGNORE
        count = int((labels != IGNORE).sum())
        if count:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * count
    total.backward()
    return float(total.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", [*PACKED, "falcon"])
def test_packed_and_padded_rows_equal_separate_rows(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation="eager").train()
    model.train(mode=False)
    rows = some_rows(6)
    expected, gradients = plain_loss(model, rows)
    for layout in ("packed", "sorted") if family in PACKED else ("sorted",):
        packed_attention.register()
        model.set_attn_implementation(packed_attention.NAME if layout == "packed" else "sdpa")
        model.zero_grad()
        loss = batch_loss(model, collate(rows, layout, pad_id=0), "cpu")  # type: ignore[arg-type]
        loss.backward()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=2e-5)
        model.set_attn_implementation("eager")


def test_every_packed_family_was_compared() -> None:
    assert set(PACKED) == {name for name, family in families.FAMILIES.items() if family.packed}


def test_idle_rank_adds_nothing_but_takes_part(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    loss = batch_loss(model, collate(some_rows(1), "sorted", pad_id=0, with_labels=False), "cpu")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_evaluation_restores_the_mode(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)).train()
    with evaluating(model):
        assert not model.training
    assert model.training
