"""Answers of the model to a few held-out questions, before and after tuning: what people look at first.

Does not know the trainer. Start at `answers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.tuning.data.dataset import Example
from runtime.tuning.model.fsdp import is_sharded
from runtime.tuning.model.lora import evaluating

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 5
"""How many questions are answered."""
NEW_TOKENS = 48
"""Longest answer: enough to compare, cheap on a CPU."""
PROMPT_TOKENS = 768
"""Longer questions are left out: they would cost more than they show."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, what the data answers, and what the model does."""

    question: str
    expected: str
    before: str
    after: str = ""


def questions(examples: Sequence[Example]) -> list[Example]:
    """Return the first few conversations that can be asked."""
    usable = [
        e for e in examples if e.messages and e.messages[-1]["role"] == "assistant" and len(e.messages) > 1
    ]
    return usable[:QUESTIONS]


def answers(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", asked: Sequence[Example]) -> list[str]:
    """Answer the last turn of each conversation greedily, all in one padded batch."""
    if not asked or not tokenizer.chat_template:
        return [""] * len(asked)
    texts = [
        str(tokenizer.apply_chat_template(list(e.messages[:-1]), tokenize=False, add_generation_prompt=True))
        for e in asked
    ]
    batch: Any = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
        truncation=True, max_length=PROMPT_TOKENS,
    )  # fmt: skip
    with evaluating(model):
        out: Any = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            synced_gpus=is_sharded(model),
            max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    width = batch["input_ids"].shape[1]
    return [str(tokenizer.decode(row[width:], skip_special_tokens=True)).strip() for row in out]
