"""The table of `TrainingArguments` keys: which a user may write, their types and our defaults.

It is a copy of transformers' own class, so that a manifest is checked without importing it (a test holds the
two equal). Names of trl's `SFTConfig` and of transformers 4 are accepted too. Does not know files or
manifests; what the trainer is given is train/schedule.py. Start at `check`, then `sft_settings`.
"""

import math
from collections.abc import Mapping
from typing import Any

from runtime.config import describe, nearest
from runtime.errors import ConfigError
from runtime.tuning import loggers

DEFAULTS: dict[str, Any] = {
    # QLoRA's learning rate up to 13B (arXiv:2305.14314, appendix B.2, table 9).
    "learning_rate": 2e-4,
    # transformers' own number of passes, and KAITO's.
    "num_train_epochs": 3.0,
    # Share of all steps (below 1) in which the learning rate rises: QLoRA, same table.
    "warmup_steps": 0.03,
    # Falls to 0: short runs end at a lower held-out loss than with QLoRA's constant learning rate.
    "lr_scheduler_type": "cosine",
    # QLoRA clips the gradient's norm here (appendix B.2).
    "max_grad_norm": 0.3,
    "weight_decay": 0.0,
    "optim": "adamw_torch",
    # Seeds adapters, dropout and the order of rows: the same job gives the same bytes.
    "seed": 42,
    "logging_steps": 1,
    "report_to": ["none"],
    # Checkpoints are taken by time (`TuningJob.checkpoint_minutes`) unless the user asks for steps.
    "save_strategy": "no",
    "save_total_limit": 2,
}
"""Our defaults; the preset's and the user's override them. transformers' own apply to other keys."""

EFFECTIVE_BATCH = 16
"""Rows of one optimizer step over all ranks when the user sets no batch size (QLoRA, table 9)."""

STEPS_PER_EPOCH = 50
"""Small data sets get smaller steps, at least 4 rows, so that a pass has about this many of them."""

_SCHEDULERS = (
    "constant constant_with_warmup cosine cosine_warmup_with_min_lr cosine_with_min_lr "
    "cosine_with_restarts greedy inverse_sqrt linear polynomial reduce_lr_on_plateau warmup_stable_decay"
)
_OPTIMIZERS = (
    "adafactor adagrad adalomo adamw_8bit adamw_anyprecision adamw_bnb_8bit adamw_torch adamw_torch_4bit "
    "adamw_torch_8bit adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla ademamix ademamix_8bit "
    "apollo_adamw apollo_adamw_layerwise galore_adafactor galore_adafactor_layerwise galore_adamw "
    "galore_adamw_8bit galore_adamw_8bit_layerwise galore_adamw_layerwise grokadamw lion_32bit lion_8bit "
    "lomo paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit "
    "paged_lion_8bit rmsprop rmsprop_bnb rmsprop_bnb_32bit rmsprop_bnb_8bit schedule_free_adamw "
    "schedule_free_radam schedule_free_sgd sgd stable_adamw"
)

KINDS: dict[str, str] = {
    "output_dir": "str?",
    "per_device_train_batch_size": "int",
    "num_train_epochs": "float",
    "max_steps": "int",
    "learning_rate": "float",
    "lr_scheduler_kwargs": "mapping?",
    "warmup_steps": "float",
    "optim_args": "str?",
    "weight_decay": "float",
    "adam_beta1": "float",
    "adam_beta2": "float",
    "adam_epsilon": "float",
    "optim_target_modules": "list?",
    "gradient_accumulation_steps": "int",
    "average_tokens_across_devices": "bool",
    "max_grad_norm": "float",
    "label_smoothing_factor": "float",
    "bf16": "bool",
    "fp16": "bool",
    "bf16_full_eval": "bool",
    "fp16_full_eval": "bool",
    "tf32": "bool?",
    "activation_checkpointing": "bool?",
    "activation_checkpointing_kwargs": "mapping?",
    "gradient_checkpointing": "bool?",
    "gradient_checkpointing_kwargs": "mapping?",
    "torch_compile": "bool",
    "torch_compile_backend": "str?",
    "torch_compile_mode": "str?",
    "use_liger_kernel": "bool",
    "liger_kernel_config": "mapping?",
    "use_cache": "bool",
    "neftune_noise_alpha": "float?",
    "torch_empty_cache_steps": "int?",
    "auto_find_batch_size": "bool",
    "logging_strategy": "epoch|no|steps",
    "logging_steps": "float",
    "logging_first_step": "bool",
    "log_on_each_node": "bool",
    "logging_nan_inf_filter": "bool",
    "include_num_input_tokens_seen": "str",
    "log_level": "str",
    "log_level_replica": "str",
    "disable_tqdm": "bool?",
    "report_to": "list?",
    "run_name": "str?",
    "project": "str",
    "trackio_space_id": "str?",
    "trackio_bucket_id": "str?",
    "trackio_static_space_id": "str?",
    "eval_strategy": "epoch|no|steps",
    "eval_steps": "float?",
    "eval_delay": "float",
    "per_device_eval_batch_size": "int",
    "prediction_loss_only": "bool",
    "eval_on_start": "bool",
    "eval_do_concat_batches": "bool",
    "eval_use_gather_object": "bool",
    "eval_accumulation_steps": "int?",
    "include_for_metrics": "list",
    "batch_eval_metrics": "bool",
    "save_only_model": "bool",
    "save_strategy": "best|epoch|no|steps",
    "save_steps": "float",
    "save_on_each_node": "bool",
    "save_total_limit": "int?",
    "enable_jit_checkpoint": "bool",
    "push_to_hub": "bool",
    "hub_token": "str?",
    "hub_private_repo": "bool?",
    "hub_model_id": "str?",
    "hub_strategy": "all_checkpoints|checkpoint|end|every_save",
    "hub_always_push": "bool",
    "hub_revision": "str?",
    "load_best_model_at_end": "bool",
    "metric_for_best_model": "str?",
    "greater_is_better": "bool?",
    "ignore_data_skip": "bool",
    "restore_callback_states_from_checkpoint": "bool",
    "full_determinism": "bool",
    "seed": "int",
    "data_seed": "int?",
    "use_cpu": "bool",
    "accelerator_config": "mapping?",
    "parallelism_config": "str?",
    "dataloader_drop_last": "bool",
    "dataloader_num_workers": "int",
    "dataloader_pin_memory": "bool",
    "dataloader_persistent_workers": "bool",
    "dataloader_prefetch_factor": "int?",
    "dataloader_multiprocessing_context": "str?",
    "dataloader_in_order": "bool",
    "remove_unused_columns": "bool",
    "label_names": "list?",
    "train_sampling_strategy": "str",
    "length_column_name": "str",
    "ddp_find_unused_parameters": "bool?",
    "ddp_bucket_cap_mb": "int?",
    "ddp_broadcast_buffers": "bool?",
    "ddp_static_graph": "bool?",
    "ddp_backend": "str?",
    "ddp_timeout": "int",
    "fsdp": "str?",
    "fsdp_config": "mapping?",
    "deepspeed": "mapping?",
    "debug": "list",
    "skip_memory_metrics": "bool",
    "do_train": "bool",
    "do_eval": "bool",
    "do_predict": "bool",
    "resume_from_checkpoint": "str?",
    "local_rank": "int",
    "lr_scheduler_type": _SCHEDULERS.replace(" ", "|"),
    "optim": _OPTIMIZERS.replace(" ", "|"),
}
"""Every argument of transformers 5.23's class: a type name (`?`: may be null) or its choices."""

RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "no_cuda": "use_cpu"}
"""Names of transformers 4 for arguments that were only renamed."""

_OBSOLETE = (
    "overwrite_output_dir save_safetensors logging_dir group_by_length fp16_opt_level half_precision_backend "
    "tpu_num_cores past_index dataset_num_proc dataset_kwargs dataset_batch_size padding_free "
    "packing_strategy eval_packing activation_offloading pad_to_multiple_of include_tokens_per_second "
    "jit_mode_eval torchdynamo ray_scope label_names remove_unused_columns length_column_name "
    "train_sampling_strategy"
)
OBSOLETE = frozenset(_OBSOLETE.split())
"""Accepted without effect: what they do is always done, or done by our own encoding and batching."""

REFUSED = {
    "deepspeed": "DeepSpeed is not part of this image; several GPUs work through DDP",
    "push_to_hub": "the adapter is pushed to 'output.image', not to a hub",
    "parallelism_config": "tensor and context parallelism are not supported here",
    "hub_token": "a token must not stand in a file; set the environment variable HF_TOKEN",
}
"""Arguments that are errors unless they are empty or false."""

SFT = frozenset(
    {
        "max_length",
        "max_seq_length",
        "packing",
        "assistant_only_loss",
        "completion_only_loss",
        "dataset_text_field",
    }
)
"""Names of trl's SFTConfig for how rows are encoded: see `sft_settings`."""

_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def check(training: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the section's `TrainingArguments`, each of its right type; ConfigError for the first wrong one.

    SFTConfig's names for rows are left to `sft_settings`, and obsolete ones are dropped.
    `where` names the file and section in errors.
    """
    checked: dict[str, Any] = {}
    for written, value in training.items():
        name = RENAMED.get(written, written)
        if name in REFUSED and value not in (None, False, ""):
            raise ConfigError(f"{where}: '{written}' cannot be used: {REFUSED[name]}")
        if name in OBSOLETE or name in SFT or name in REFUSED:
            continue
        if name not in KINDS:
            hint = nearest(written, KINDS.keys() | SFT)
            expected = hint or "; expected an argument of transformers.TrainingArguments"
            raise ConfigError(f"{where}: unknown key '{written}'{expected}")
        if value is None and not KINDS[name].endswith("?"):
            continue  # a key without a value
        checked[name] = _value(value, KINDS[name], f"{where}: '{written}'")
    _check_ranges(checked, where)
    return checked


def sft_settings(training: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return the settings {"encoding": {...}, "data": {...}} for SFTConfig's names in the section."""
    encoding: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name in ("max_length", "max_seq_length"):
        if training.get(name) is not None:
            encoding["max_tokens"] = _value(training[name], "int", f"{where}: '{name}'")
    if training.get("packing") is not None:
        packing = _value(training["packing"], "bool", f"{where}: 'packing'")
        encoding["batching"] = "packed" if packing else "auto"
    for name in ("assistant_only_loss", "completion_only_loss"):
        if training.get(name) is not None:
            only = _value(training[name], "bool", f"{where}: '{name}'")
            encoding["loss_on"] = "assistant" if only else encoding.get("loss_on", "all")
    if training.get("dataset_text_field") is not None:
        data["response_column"] = _value(
            training["dataset_text_field"], "str", f"{where}: 'dataset_text_field'"
        )
    return {"encoding": encoding, "data": data}


def _value(value: Any, kind: str, what: str) -> Any:
    """Return `value` as `kind`: the name of a type, with `?` where null is allowed, or choices with `|`."""
    if kind.endswith("?"):
        if value is None or value == "null":
            return None
        kind = kind[:-1]
    if "|" in kind:
        return _choice(value, kind.split("|"), what)
    if kind == "bool":
        boolean = value if isinstance(value, bool) else _BOOLEANS.get(str(value).strip().lower())
        if boolean is None:
            raise ConfigError(f"{what} is {describe(value)}, expected true or false")
        return boolean
    if kind in ("int", "float"):
        return _number(value, kind, what)
    if kind == "list":
        return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    if kind == "mapping":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{what} is {describe(value)}, expected keys and values")
        return dict(value)
    if isinstance(value, Mapping | list) or value is None:
        raise ConfigError(f"{what} is {describe(value)}, expected a string")
    return str(value)


def _choice(value: Any, choices: list[str], what: str) -> str:
    # YAML 1.1 readers upstream may have turned an unquoted `no` into false already.
    choice = "no" if value is False and "no" in choices else str(value).strip()
    if choice not in choices:
        hint = nearest(choice, choices) or f", expected one of {', '.join(choices)}"
        raise ConfigError(f"{what} is {describe(value)}{hint}")
    return choice


def _number(value: Any, kind: str, what: str) -> int | float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None or math.isnan(number) or (kind == "int" and not number.is_integer()):
        expected = "a whole number" if kind == "int" else "a number"
        raise ConfigError(f"{what} is {describe(value)}, expected {expected}")
    return int(number) if kind == "int" else number


_POSITIVE = (
    "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_eval_batch_size", "logging_steps", "save_steps", "eval_steps",
)  # fmt: skip


def _check_ranges(checked: Mapping[str, Any], where: str) -> None:
    for name in _POSITIVE:
        if checked.get(name) is not None and checked[name] <= 0:
            raise ConfigError(f"{where}: '{name}' is {checked[name]}, expected a number above 0")
    if checked.get("fp16") and checked.get("bf16"):
        raise ConfigError(f"{where}: 'fp16' and 'bf16' are both true, expected at most one of them")
    loggers.known(checked.get("report_to") or (), where)
    if checked.get("save_strategy") == "best":
        raise ConfigError(f"{where}: 'save_strategy' is 'best', expected 'no', 'steps' or 'epoch'")
