"""A job's training schedule: how rows become steps and passes, when to evaluate, Trainer's arguments.

Knows both our settings and transformers'. Which keys a user may write, and their defaults, is
runtime/tuning/arguments. Start at `batch_plan` and `trainer_arguments`.
"""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import families
from runtime.errors import ConfigError
from runtime.hardware import Hardware, has_tensor_float32
from runtime.tuning.arguments import rules
from runtime.tuning.arguments.training import DEFAULTS, EFFECTIVE_BATCH, STEPS_PER_EPOCH
from runtime.tuning.data.batching import BatchPlan, Layout
from runtime.tuning.data.tokenize import MAX_TOKENS, TokenizedData
from runtime.tuning.precision import Precision
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob

if TYPE_CHECKING:
    from transformers import TrainingArguments

log = logging.getLogger(__name__)

BUDGET_TOKENS = {"cpu": 1024, "cuda": 2048}
"""Tokens of a forward pass when the user sets no batch size: on a CPU more tokens are not faster, and on a
GPU the memory plan may allow more."""

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
    "load_best_model_at_end",
    "fsdp",
    "train_sampling_strategy",
}
"""Arguments that our own loop implements, so that Trainer must not."""


def choose_layout(requested: str, model_type: str) -> Layout:
    """Return "packed" where the attention keeps documents apart, else "sorted" (by length)."""
    packable = families.find(model_type).packed
    if requested == "packed" and not packable:
        log.warning("batching 'packed' is not safe for %s: rows are sorted by length", model_type)
    return "packed" if packable and requested != "sorted" else "sorted"


def batch_plan(
    job: TuningJob, data: TokenizedData, *, layout: Layout, ranks: Ranks, hardware: Hardware
) -> BatchPlan:
    """Return how the rows of `data` become steps.

    A user's batch size times accumulation times ranks is the rows of a step. Without one, a step has
    EFFECTIVE_BATCH rows over all ranks, fewer where the data is small. What one forward pass may hold is the
    memory plan's choice (fit.py), or `pass_tokens` without a plan; it divides steps and changes none.
    """
    training = {**DEFAULTS, **job.training}
    budget = pass_tokens(job, hardware)
    data_seed = training.get("data_seed")
    lengths = tuple(map(len, data.sequences))
    return BatchPlan(
        lengths=lengths,
        labelled_tokens=tuple(sequence.labelled_tokens for sequence in data.sequences),
        rows_per_step=rows_per_step(job, data.rows, ranks.world_size),
        budget_tokens=max(budget, *lengths) if lengths else budget,
        layout=layout,
        world=ranks.world_size,
        seed=training["seed"] if data_seed is None else data_seed,
        drop_last=bool(training.get("dataloader_drop_last")),
        shuffled=training.get("train_sampling_strategy") != "sequential",
        sequences_per_row=data.sequences_per_row,
    )


def rows_per_step(job: TuningJob, rows: int | None, processes: int) -> int:
    """Return the rows of a step over all `processes`, of `rows` in all; the most of any job where unknown."""
    training = {**DEFAULTS, **job.training}
    per_device = training.get("per_device_train_batch_size")
    accumulation = int(training.get("gradient_accumulation_steps", 1))
    if per_device is not None:
        wanted = int(per_device) * accumulation * processes
    elif rows is None:
        wanted = EFFECTIVE_BATCH * accumulation
    else:
        wanted = min(EFFECTIVE_BATCH, max(4, rows // STEPS_PER_EPOCH)) * accumulation
    return wanted if rows is None else min(wanted, rows)


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
    if not held_out:
        rules.check_held_out(job)
    if not held_out and given.get("eval_strategy", "no") != "no":
        log.warning("eval_strategy is without effect: no rows are held out (train_test_split)")
        given["eval_strategy"] = "no"
    if given.get("tf32") and not has_tensor_float32(hardware):
        log.warning("tf32 is without effect: %s has no TensorFloat-32", hardware.name)
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "gradient_accumulation_steps": 1,
        **_checkpointing_arguments(job),
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "tf32": given.get("tf32") if has_tensor_float32(hardware) else None,
        "use_cpu": hardware.kind == "cpu",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": [],
        "save_total_limit": None,
        "enable_jit_checkpoint": False,
        "restore_callback_states_from_checkpoint": False,
        "ddp_find_unused_parameters": bool(given.get("ddp_find_unused_parameters")),
        "greater_is_better": False,
        "average_tokens_across_devices": False,
        "dataloader_num_workers": 0,
    }
    try:
        return TrainingArguments(**{**given, **fixed})
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ConfigError(f"TrainingArguments: {' '.join(str(error).split())}") from None


def settle_steps(args: "TrainingArguments", job: TuningJob, plan: BatchPlan) -> None:
    """Set the warm-up, which depends on the number of steps; ConfigError when these are too few."""
    total = total_steps(args, plan)
    rules.check_steps(job, total=total)
    args.warmup_steps = rules.warmup_steps(job.training, total)
    if args.logging_strategy == "steps" and args.logging_steps > total:
        log.warning(
            "logging_steps is %g and the run has %d steps: no loss is logged", args.logging_steps, total
        )


def total_steps(args: "TrainingArguments", plan: BatchPlan) -> int:
    """Return the optimizer steps of the run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)


def chooses_evaluations(job: TuningJob) -> bool:
    """Whether it is left to us at which steps the held-out loss is measured."""
    training = {**DEFAULTS, **job.training}
    every = training.get("eval_steps") or training["logging_steps"] != DEFAULTS["logging_steps"]
    return "eval_strategy" not in training or (training["eval_strategy"] == "steps" and not every)


def best_metric(job: TuningJob) -> str | None:
    """Return the metric whose lowest value says which step is kept; None where the last one is."""
    if not job.training.get("load_best_model_at_end"):
        return None
    return f"eval_{(job.training.get('metric_for_best_model') or 'loss').removeprefix('eval_')}"


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


def schedule_evaluations(
    args: "TrainingArguments", plan: BatchPlan, *, held_out_tokens: int, searches: bool = False
) -> None:
    """Evaluate at even distances, as often as is cheap: a curve shows when the held-out loss rises.

    A job that `searches` for its best step is evaluated as often whatever that costs.
    A step costs a forward and a backward pass, which is twice the forward one; an evaluation a forward pass.
    """
    from transformers import IntervalStrategy

    steps = total_steps(args, plan)
    trained = steps * plan.rows_per_step * sum(plan.lengths) / plan.rows
    affordable = int(EVALUATION_COST * 3 * trained / max(held_out_tokens, 1))
    least = EVALUATIONS if searches else int(args.eval_strategy == IntervalStrategy.STEPS)
    count = min(EVALUATIONS, max(affordable, least), max(steps - 1, least and 1))
    if count > 0:
        args.eval_strategy = IntervalStrategy.STEPS
        args.eval_steps = steps // (count + 1) + 1  # mostly not the last step, which is measured anyway
