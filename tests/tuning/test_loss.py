"""The loss of a batch without labels, and of a held-out set."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from runtime.tuning.data.batching import collate
from runtime.tuning.loss import HeldOutRows, batch_loss, mean_loss
from runtime.tuning.model import lora
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import Lora
from tests.tuning.tiny_models import some_rows


def test_idle_rank_adds_nothing_but_takes_part(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    loss = batch_loss(model, collate(some_rows(1), "sorted", pad_id=0, with_labels=False), "cpu")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_an_evaluation_tells_how_many_of_its_passes_are_done(tiny_llama_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    model = lora.attach(base, Lora(r=2), checkpointing=False)
    rows = some_rows(4)
    told: list[tuple[int, int]] = []
    loss = mean_loss(
        model,
        HeldOutRows(rows, "sorted", len(rows[0])),
        Ranks(),
        lambda done, total: told.append((done, total)),
    )
    assert loss > 0
    assert told == [(n, len(told)) for n in range(1, len(told) + 1)]
    assert len(told) > 1
