"""How good the model is before and after training: its held-out loss, and answers to a few questions.

Collectives run in here: all ranks evaluate together. Does not know reports. Start at `evaluate`.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from runtime import chat_template, models
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

NEW_TOKENS = 48
"""Longest answer: enough to compare, cheap on a CPU."""
PROMPT_TOKENS = 768
"""Longer questions are left out: they would cost more than they show."""
COUNTED_TOKENS = 3 * NEW_TOKENS // 4
"""Longest answer of the data beside which one that reaches the limit did not end: others may be as long."""


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """An answer to a sample question."""

    text: str
    ended: bool | None = None
    """Whether the model ended it within the limit; None where the data's own answer hardly does."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the model is at one moment."""

    loss: float | None
    """Held-out loss per labelled token; None when nothing is held out."""
    answers: tuple[SampleAnswer, ...]
    """To the sample questions; empty texts on ranks above 0."""


def evaluate(setup: TrainingSetup, questions: Sequence[Example]) -> Evaluation:
    """Return the held-out loss of all ranks and (rank 0) the answers to the sample questions."""
    ranks, held_out = setup.rank.ranks, setup.trainer.workload.held_out
    what = f"the loss of {counted(len(held_out), 'held-out row')}, " if held_out else ""
    log.info("evaluating: %sthe answers to %s", what, counted(len(questions), "question"))
    answers = [SampleAnswer("")] * len(questions)
    with contextlib.closing(setup.callbacks.reporter) as reporter:
        with training_attention(setup):
            loss = setup.trainer.held_out_loss() if held_out else None
        if ranks.is_main or is_sharded(setup.model):
            shown = partial(reporter.show_activity, "answering, token") if ranks.is_main else _silent
            answers = generate(setup.model, setup.tokenizer, questions, shown=shown)
            reporter.end_activity()
    ranks.barrier()
    if loss is not None:
        setup.throughput.held_out_loss = loss
        log.info("held-out loss %.4f", loss)
    return Evaluation(loss, tuple(answers))


def generate(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Example],
    *,
    shown: Callable[[int, int], None],
) -> list[SampleAnswer]:
    """Answer the last turn of each conversation greedily, all in one padded batch.

    `shown` is called with the number of tokens that each answer has, and the most that it may have.
    """
    if not questions or not tokenizer.chat_template:
        return [SampleAnswer("")] * len(questions)
    prompts = [question_prompt(tokenizer, example) for example in questions]
    batch: Any = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
        truncation=True, max_length=PROMPT_TOKENS,
    )  # fmt: skip
    stated: Any = model.generation_config
    ends = models.end_ids(stated.eos_token_id, tokenizer.eos_token_id)  # as the server stops
    with evaluating(model):
        out: Any = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            synced_gpus=is_sharded(model),
            max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends) or None,
            stopping_criteria=StoppingCriteriaList([_Counting(shown)]),
        )  # fmt: skip
    answers = out[:, batch["input_ids"].shape[1] :].tolist()
    return [
        SampleAnswer(
            str(tokenizer.decode(ids, skip_special_tokens=True)).strip(),
            not ends.isdisjoint(ids) if _is_short(tokenizer, example) else None,
        )
        for ids, example in zip(answers, questions, strict=True)
    ]


class _Counting(StoppingCriteria):
    """Stops nothing, and tells how many tokens there are."""

    def __init__(self, shown: Callable[[int, int], None]) -> None:
        self._shown, self._tokens = shown, 0
        shown(0, NEW_TOKENS)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self._tokens += 1
        self._shown(self._tokens, NEW_TOKENS)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def _silent(tokens: int, most: int) -> None:
    """Show nothing: another rank does."""


def _is_short(tokenizer: "PreTrainedTokenizerBase", example: Example) -> bool:
    """Return whether the data's own answer is far from the limit."""
    answer = example.messages[-1]
    said = [answer.get(key) for key in ("reasoning_content", "content", "tool_calls")]
    text = "".join(part if isinstance(part, str) else json.dumps(part) for part in said if part)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= COUNTED_TOKENS


def question_prompt(tokenizer: "PreTrainedTokenizerBase", example: Example) -> str:
    """Return what the server would render of the messages before the last answer."""
    asked = dialogue(example.messages[:-1], example.tools)
    return chat_template.render(tokenizer, asked.messages, TemplateOptions(tools=list(asked.tools) or None))
