"""The loss of a batch without labels."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from runtime.tuning.data.batching import collate
from runtime.tuning.loss import batch_loss
from tests.tuning.tiny_models import some_rows


def test_idle_rank_adds_nothing_but_takes_part(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    loss = batch_loss(model, collate(some_rows(1), "sorted", pad_id=0, with_labels=False), "cpu")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
