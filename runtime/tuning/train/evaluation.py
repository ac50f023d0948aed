"""How good the model is before and after training: its held-out loss, and answers to a few questions.

Collectives run in here: all ranks evaluate together. Does not know reports. Start at `evaluate`.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.logs import counted
from runtime.tuning.data.answers import dialogue
from runtime.tuning.data.example import Example
from runtime.tuning.model.fsdp import is_sharded
from runtime.tuning.model.lora import evaluating
from runtime.tuning.train.setup import TrainingSetup, training_attention

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

QUESTIONS = 5
"""How many questions are answered."""
NEW_TOKENS = 48
"""Longest answer: enough to compare, cheap on a CPU."""
PROMPT_TOKENS = 768
"""Longer questions are left out: they would cost more than they show."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the model is at one moment."""

    loss: float | None
    """Held-out loss per labelled token; None when nothing is held out."""
    answers: tuple[str, ...]
    """To the sample questions; empty texts on ranks above 0."""


def evaluate(setup: TrainingSetup, questions: Sequence[Example]) -> Evaluation:
    """Return the held-out loss of all ranks and (rank 0) the answers to the sample questions."""
    ranks, held_out = setup.rank.ranks, setup.trainer.workload.held_out
    what = f"the loss of {counted(len(held_out), 'held-out row')}, " if held_out else ""
    log.info("evaluating: %sthe answers to %s", what, counted(len(questions), "question"))
    with training_attention(setup), contextlib.closing(setup.callbacks.reporter):
        loss = setup.trainer.held_out_loss() if held_out else None
    answering = ranks.is_main or is_sharded(setup.model)
    answers = generate(setup.model, setup.tokenizer, questions) if answering else [""] * len(questions)
    ranks.barrier()
    if loss is not None:
        setup.throughput.held_out_loss = loss
        log.info("held-out loss %.4f", loss)
    return Evaluation(loss, tuple(answers))


def sample_questions(examples: Sequence[Example]) -> list[Example]:
    """Return the first few conversations that end with an answer to a question."""
    usable = [
        e for e in examples if e.messages and e.messages[-1]["role"] == "assistant" and len(e.messages) > 1
    ]
    return usable[:QUESTIONS]


def generate(
    model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", questions: Sequence[Example]
) -> list[str]:
    """Answer the last turn of each conversation greedily, all in one padded batch."""
    if not questions or not tokenizer.chat_template:
        return [""] * len(questions)
    prompts = [question_prompt(tokenizer, example) for example in questions]
    batch: Any = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
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
    return [str(tokenizer.decode(ids[width:], skip_special_tokens=True)).strip() for ids in out]


def question_prompt(tokenizer: "PreTrainedTokenizerBase", example: Example) -> str:
    """Return what the server would render of the messages before the last answer."""
    asked = dialogue(example.messages[:-1], example.tools)
    return chat_template.render(tokenizer, asked.messages, TemplateOptions(tools=list(asked.tools) or None))
