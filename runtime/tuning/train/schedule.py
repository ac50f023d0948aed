"""A job's training schedule: how rows become steps and passes, when to evaluate, Trainer's arguments.

Knows both our settings and transformers'. Which keys a user may write, and their defaults, is
runtime/tuning/training_arguments.py. Start at `batch_plan` and `trainer_arguments`.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import families
from runtime.hardware import Hardware
from runtime.tuning.data.batching import BatchPlan, Layout
from runtime.tuning.data.tokenize import MAX_TOKENS, TokenizedRow
from runtime.tuning.precision import Precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob
from runtime.tuning.training_arguments import DEFAULTS, EFFECTIVE_BATCH, REFUSED, STEPS_PER_EPOCH

if TYPE_CHECKING:
    from transformers import TrainingArguments

log = logging.getLogger(__name__)

BUDGET_TOKENS = {"cpu": 1024, "cuda": 2048}
"""Tokens of a forward pass when the user sets no batch size: on a CPU more tokens are not faster."""

EVALUATIONS = 8
"""Held-out losses measured while training, where the user names no eval_strategy and the cost is small."""
EVALUATION_COST = 0.05
"""Most of a run's arithmetic that they may take."""

_NOT_PASSED_ON = {
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "fsdp",
    "fsdp_config",
    *REFUSED,
}
"""Arguments that our own loop implements, so that Trainer must not."""


def choose_layout(requested: str, model_type: str) -> Layout:
    """Return "packed" where the attention keeps documents apart, else "sorted" (by length)."""
    packable = families.find(model_type).packed
    if requested == "packed" and not packable:
        log.warning("batching 'packed' is not safe for %s: rows are sorted by length", model_type)
    return "packed" if packable and requested != "sorted" else "sorted"


def batch_plan(
    job: TuningJob, rows: Sequence[TokenizedRow], *, layout: Layout, ranks: Ranks, hardware: Hardware
) -> BatchPlan:
    """Return how `rows` become steps.

    A user's batch size times accumulation times ranks is the rows of a step, and what one forward pass
    may hold is batch size times max_tokens. Without one, a step has EFFECTIVE_BATCH rows over all
    ranks, fewer where the data is small.
    """
    training = {**DEFAULTS, **job.training}
    per_device = training.get("per_device_train_batch_size")
    accumulation = training.get("gradient_accumulation_steps", 1)
    budget = pass_tokens(job, hardware)
    if per_device is None:
        step_rows = min(EFFECTIVE_BATCH, max(4, len(rows) // STEPS_PER_EPOCH)) * accumulation
    else:
        step_rows = per_device * accumulation * ranks.world_size
    return BatchPlan(
        lengths=tuple(len(row) for row in rows),
        labelled_tokens=tuple(row.labelled_tokens for row in rows),
        rows_per_step=min(step_rows, len(rows)),
        budget_tokens=max(budget, *(len(row) for row in rows)) if rows else budget,
        layout=layout,
        world=ranks.world_size,
        seed=training.get("data_seed") or training["seed"],
        drop_last=bool(training.get("dataloader_drop_last")),
    )


def pass_tokens(job: TuningJob, hardware: Hardware) -> int:
    """Return the most tokens of one forward pass on one rank; a longer row goes alone."""
    if job.tokens_per_pass is not None:
        return job.tokens_per_pass
    per_device = job.training.get("per_device_train_batch_size")
    if per_device is None:
        return BUDGET_TOKENS[hardware.kind]
    tokens = int(per_device) * (job.encoding.max_tokens or MAX_TOKENS)
    return min(tokens, BUDGET_TOKENS["cpu"]) if hardware.kind == "cpu" else tokens


def requested_checkpointing(job: TuningJob) -> bool | None:
    """Return whether the job recomputes activations in the backward pass, None when it does not say.

    The memory plan (fit.py) writes its own decision to the same setting.
    """
    requested = job.training.get("gradient_checkpointing", job.training.get("activation_checkpointing"))
    return None if requested is None else bool(requested)


def trainer_arguments(
    job: TuningJob, folder: Path, *, precision: Precision, hardware: Hardware, held_out: bool
) -> "TrainingArguments":
    """Return Trainer's arguments: the user's over our defaults, with what our loop needs fixed on top."""
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        key: value for key, value in {**DEFAULTS, **job.training}.items() if key not in _NOT_PASSED_ON
    }
    if not held_out and given.get("eval_strategy", "no") != "no":
        log.warning("eval_strategy is without effect: no rows are held out (train_test_split)")
        given["eval_strategy"] = "no"
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 1,
        **_checkpointing_arguments(job),
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "use_cpu": hardware.kind == "cpu",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": [],
        "save_total_limit": None,
        "enable_jit_checkpoint": False,
        "restore_callback_states_from_checkpoint": False,
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": False,
        "dataloader_num_workers": 0,
    }
    return TrainingArguments(**{**given, **fixed})


def _checkpointing_arguments(job: TuningJob) -> dict[str, Any]:
    training = job.training
    given = training.get("activation_checkpointing_kwargs") or training.get("gradient_checkpointing_kwargs")
    checkpointing = bool(requested_checkpointing(job))
    return {
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False, **(given or {})}
        if checkpointing
        else None,
    }


def schedule_evaluations(args: "TrainingArguments", plan: BatchPlan, *, held_out_tokens: int) -> None:
    """Evaluate at even distances, as often as is cheap: a curve shows when the held-out loss rises.

    A step costs a forward and a backward pass, which is twice the forward one; an evaluation a forward pass.
    """
    from transformers import IntervalStrategy

    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    trained = steps * plan.rows_per_step * sum(plan.lengths) / len(plan.lengths)
    affordable = int(EVALUATION_COST * 3 * trained / max(held_out_tokens, 1))
    count = min(EVALUATIONS, affordable, steps - 1)
    if count > 0:
        args.eval_strategy = IntervalStrategy.STEPS
        args.eval_steps = steps // (count + 1) + 1  # mostly not the last step, which is measured anyway
