"""What settings need of one another is refused in the dry run; what has no effect is said."""

import re
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.tuning.arguments import rules
from runtime.tuning.settings import TuningJob
from tests.workspace.documents import SEED, load

HELD_OUT = {"DatasetConfig.train_test_split": 0.8}
ALL = {"DatasetConfig.train_test_split": 1}


def arguments(**training: Any) -> dict[str, Any]:
    return {f"TrainingArguments.{name}": value for name, value in training.items()}


BEST = arguments(load_best_model_at_end=True)
EVERY_2 = arguments(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (BEST | arguments(eval_strategy="no"), "compares held-out losses, and eval_strategy is 'no'"),
        (BEST | ALL | EVERY_2, "'load_best_model_at_end' needs the loss of held-out rows"),
        (BEST | EVERY_2 | arguments(max_steps=1), "'eval_steps' is 2, but the run has 1 steps"),
        (arguments(metric_for_best_model="accuracy"), "is 'accuracy', expected loss or perplexity"),
        (arguments(greater_is_better=True), "the lower loss is the better"),
        (arguments(save_strategy="best"), "set load_best_model_at_end: true"),
        (arguments(lr_scheduler_type="reduce_lr_on_plateau"), "follows the held-out loss: set eval_strategy"),
        (
            arguments(lr_scheduler_type="greedy", lr_scheduler_kwargs={"min_lr": 0}),
            "follows the held-out loss",
        ),
        (
            ALL | arguments(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"),
            "'lr_scheduler_type' needs the loss of held-out rows",
        ),
        (arguments(lr_scheduler_type="cosine_with_min_lr"), "needs either 'min_lr' or 'min_lr_rate'"),
        (arguments(lr_scheduler_type="warmup_stable_decay"), "needs 'num_decay_steps'"),
        (arguments(lr_scheduler_kwargs={"foo": 1}), "lr_scheduler_kwargs has 'foo'"),
        (
            arguments(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 1.0}),
            "'lr_end' is 1, expected less than learning_rate",
        ),
        (arguments(warmup_steps=20, max_steps=10), "'warmup_steps' is 20, but the run has 10 steps"),
        (arguments(max_steps=0), "max_steps is 0, expected at least 1"),
        (arguments(max_steps=-2), "max_steps is -2, expected at least 1"),
        (arguments(learning_rate=1e12), "learning_rate is 1e+12, expected a number above 0 and at most 1"),
        (arguments(optim="galore_adamw"), "galore_torch"),
        (arguments(optim="grokadamw"), "the package grokadamw is not installed"),
        (arguments(optim_args="nonsense"), "optim_args is 'nonsense', expected key=value,key=value"),
        (arguments(optim="sgd", adam_beta1=0.5), "adam_beta1 has no effect on optim 'sgd'"),
        (arguments(resume_from_checkpoint="out/checkpoint-3"), "resumes from its own newest checkpoint"),
        (arguments(resume_from_checkpoint=False), "for a new run name another output folder"),
        (arguments(auto_find_batch_size=True, fsdp="full_shard"), "does not go with fsdp"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(SEED, tmp_path, overrides=overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            arguments(lr_scheduler_type="constant", warmup_ratio=0.03),
            "'constant' does not rise",
        ),
        (ALL | arguments(eval_strategy="epoch"), "eval_strategy has no effect unless rows are held out"),
        (arguments(metric_for_best_model="loss"), "has no effect without load_best_model_at_end"),
        (arguments(run_name="mine"), "run_name has no effect without a logger"),
        (arguments(project="mine"), "project has no effect without trackio"),
        (
            arguments(save_strategy="epoch", save_steps=5),
            "no effect: save_strategy is 'epoch'",
        ),
        (
            arguments(per_device_eval_batch_size=2),
            "per_device_eval_batch_size has no effect here: ",
        ),
        (arguments(dataloader_num_workers=4), "dataloader_num_workers has no effect here: the encoded rows"),
        (arguments(hub_model_id="x/y"), "hub_model_id has no effect here: nothing is pushed to a hub"),
        (arguments(use_liger_kernel=True), "use_liger_kernel has no effect here: fused operations"),
        (arguments(ddp_backend="nccl"), "ddp_backend has no effect here: NCCL connects GPUs"),
        ({"training.ddp_backend": "nccl"}, "flag --set training.ddp_backend has no effect here"),
    ],
)
def test_what_has_no_effect_is_said(overrides: dict[str, Any], warning: str, tmp_path: Path) -> None:
    warnings = load(SEED, tmp_path, overrides=overrides).warnings
    assert [text for text in warnings if warning in text]


@pytest.mark.parametrize(
    "overrides",
    [
        BEST,
        BEST | arguments(eval_strategy="epoch"),
        BEST | EVERY_2 | arguments(save_steps=4),
        BEST | HELD_OUT | EVERY_2 | arguments(eval_steps=0.1, save_steps=0.3),
        HELD_OUT | arguments(eval_strategy="epoch", lr_scheduler_type="reduce_lr_on_plateau"),
        arguments(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5}),
        arguments(optim="paged_adamw_8bit", resume_from_checkpoint=True, debug=[], lr_scheduler_kwargs=None),
        arguments(optim="sgd", learning_rate=3, optim_args="momentum=0.9"),
        {"training.lr_scheduler_kwargs.num_cycles": 0.4, "training.warmup_ratio": 0.1},
    ],
)
def test_what_goes_together_is_accepted_without_a_word(overrides: dict[str, Any], tmp_path: Path) -> None:
    before = load(SEED, tmp_path).warnings
    assert load(SEED, tmp_path, overrides=overrides).warnings == before


@pytest.mark.parametrize(
    ("given", "total", "steps"), [(0.03, 1, 0), (0.03, 20, 1), (0.5, 10, 5), (3, 10, 3), (0, 10, 0)]
)
def test_a_share_of_the_steps_is_never_the_whole_run(given: float, total: int, steps: int) -> None:
    assert rules.warmup_steps({"warmup_steps": given}, total) == steps


@pytest.mark.parametrize(("total", "steps"), [(1, 0), (33, 0), (34, 1), (100, 3)])
def test_by_default_no_step_of_a_short_run_has_a_learning_rate_of_0(total: int, steps: int) -> None:
    assert rules.warmup_steps({}, total) == steps


def test_the_steps_of_a_run_are_checked_once_they_are_known() -> None:
    job = TuningJob(name="j", model=ModelSource(name="m"), training={"warmup_steps": 30})
    rules.check_steps(job, total=31)
    with pytest.raises(ConfigError, match="'warmup_steps' is 30, but the run has 12 steps"):
        rules.check_steps(job, total=12)


def test_a_validation_set_among_the_data_counts_as_held_out_rows(tmp_path: Path) -> None:
    files = {"data.urls": ["https://example.com/train.parquet", "https://example.com/validation.parquet"]}
    load(SEED, tmp_path, overrides=BEST | ALL | EVERY_2 | files)
    with pytest.raises(ConfigError, match="none are held out"):
        load(
            SEED, tmp_path, overrides=BEST | ALL | EVERY_2 | {"data.urls": ["https://example.com/a.parquet"]}
        )
