"""The table of `TrainingArguments` keys: their types, our defaults, and what becomes of each.

A copy of transformers' own class, so that a manifest is checked without importing it (a test holds the two
equal). Names of trl's `SFTConfig` and of older transformers are accepted too. Does not know files or
manifests; what settings need of one another is rules.py, what the trainer is given train/schedule.py. Start
at `check`, then `sft_settings`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.config import describe, nearest
from runtime.errors import ConfigError
from runtime.tuning import loggers
from runtime.tuning.arguments import kinds, optimizers, schedules
from runtime.tuning.arguments.kinds import Argument, Range, harmless, honoured, read, refused

DEFAULTS: dict[str, Any] = {
    # QLoRA's learning rate up to 13B (arXiv:2305.14314, appendix B.2, table 9).
    "learning_rate": 2e-4,
    # transformers' own number of passes, and KAITO's.
    "num_train_epochs": 3.0,
    # Share of all steps (below 1) in which the learning rate rises: QLoRA, same table; rounded down.
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

_COMPILED = (
    "the model runs fused operations of this project's own, which torch.compile cannot trace; leave it out"
)
_FUSED = "fused operations of this project's own are used wherever they compute the same"
_HUB = "nothing is pushed to a hub; the adapter is pushed to 'output.image'"
_LOADER = "the encoded rows are in memory, so no process loads them"
_METRIC = "the held-out loss is the only metric, and no predictions are kept for another"
_TOKEN = "a token must not stand in a file; set the environment variable HF_TOKEN"  # noqa: S105 - a sentence
_SORTED = "rows of similar length always share a pass"
_HELD_OUT_TYPE = "the held-out loss is computed in the type of training"
_OTHER_DEVICE = "the device is an NVIDIA GPU or the CPU"

_POSITIVE = Range(above=True)
_BELOW_1 = Range(most=1.0, below=True)
_STEPS = Range(above=True, steps=True)
_COUNT = Range("int", 1)
_SEED = Range("int", 0, most=2**32 - 1)
_LEVEL = Range("passive|detail|debug|info|warning|error|critical")
_CHECKPOINTING = {
    "use_reentrant": Argument("bool"),
    "preserve_rng_state": Argument("bool"),
    "determinism_check": Argument("default|none"),
    "debug": Argument("bool"),
    "early_stop": Argument("bool"),
    "context_fn": refused("str?", "a function cannot stand in a file"),
    "every_n_layers": refused("int", "the memory plan knows every layer or none; leave it out", 1),
    "offload": refused("bool", "activations stay on the device; leave it out"),
}
_ACCELERATOR = {
    "split_batches": harmless("bool", "a batch size is that of each device"),
    "dispatch_batches": harmless("bool?", _LOADER, True, False),
    "even_batches": harmless("bool", "rows are divided by their tokens", True, False),
    "use_seedable_sampler": harmless("bool", "the seed decides the order of rows", True),
    "non_blocking": harmless("bool", "copies never block", True, False),
    "gradient_accumulation_kwargs": refused("mapping?", "set gradient_accumulation_steps"),
    "use_configured_state": refused("bool", "there is no Accelerator but Trainer's"),
}
_FSDP_KEYS = {
    "activation_checkpointing": refused("bool", "set gradient_checkpointing: true"),
    "cpu_offload": refused("bool", "shards stay on the GPUs"),
    "offload_params": refused("bool", "shards stay on the GPUs"),
    "xla": refused("bool", "the device is an NVIDIA GPU"),
    "xla_fsdp_v2": refused("bool", "the device is an NVIDIA GPU"),
    "xla_fsdp_grad_ckpt": refused("bool", "set gradient_checkpointing: true"),
    "xla_fsdp_settings": refused("mapping?", "the device is an NVIDIA GPU"),
    **dict.fromkeys(
        (
            "auto_wrap_policy",
            "backward_prefetch",
            "cpu_ram_efficient_loading",
            "forward_prefetch",
            "limit_all_gathers",
            "min_num_params",
            "mixed_precision_policy",
            "reshard_after_forward",
            "sharding_strategy",
            "state_dict_type",
            "sync_module_states",
            "use_orig_params",
            "version",
        ),
        harmless("str?", "layers are sharded whole"),
    ),
    "transformer_layer_cls_to_wrap": harmless("list?", "layers are sharded whole"),
}
_FSDP = {**_FSDP_KEYS, **{f"fsdp_{name}": argument for name, argument in _FSDP_KEYS.items()}}

ARGUMENTS: dict[str, Argument] = {
    # --- steps and the learning rate
    "output_dir": Argument("str?"),
    "per_device_train_batch_size": Argument("int", range=_COUNT),
    "num_train_epochs": Argument("float", range=_POSITIVE),
    "max_steps": Argument("int"),
    "learning_rate": Argument("float", range=_POSITIVE),
    "lr_scheduler_type": Argument("|".join(sorted(schedules.SCHEDULES))),
    "lr_scheduler_kwargs": Argument("mapping?"),
    "warmup_steps": Argument("float", range=Range(steps=True)),
    "gradient_accumulation_steps": Argument("int", range=_COUNT),
    "average_tokens_across_devices": harmless(
        "bool", "the loss is the mean over the labelled tokens of all devices", True
    ),
    "max_grad_norm": Argument("float", range=Range()),
    "label_smoothing_factor": Argument("float", range=_BELOW_1),
    "neftune_noise_alpha": Argument("float?", range=Range()),
    # --- optimizer
    "optim": Argument("|".join(sorted(optimizers.OPTIMIZERS)), offered=optimizers.OFFERED),
    "optim_args": Argument("str?"),
    "optim_target_modules": refused("list?", "it is for GaLore and APOLLO, which cannot be used here"),
    "weight_decay": Argument("float", range=Range()),
    "adam_beta1": Argument("float", range=_BELOW_1),
    "adam_beta2": Argument("float", range=_BELOW_1),
    "adam_epsilon": Argument("float", range=_POSITIVE),
    # --- precision and memory
    "bf16": Argument("bool"),
    "fp16": Argument("bool"),
    "bf16_full_eval": harmless("bool", _HELD_OUT_TYPE),
    "fp16_full_eval": harmless("bool", _HELD_OUT_TYPE),
    "tf32": Argument("bool?"),
    "activation_checkpointing": Argument("bool?"),
    "activation_checkpointing_kwargs": Argument("mapping?", keys=_CHECKPOINTING),
    "gradient_checkpointing": Argument("bool?"),
    "gradient_checkpointing_kwargs": Argument("mapping?", keys=_CHECKPOINTING),
    "torch_compile": refused("bool", _COMPILED),
    "torch_compile_backend": refused("str?", _COMPILED),
    "torch_compile_mode": refused("str?", _COMPILED),
    "use_liger_kernel": harmless("bool", _FUSED),
    "liger_kernel_config": harmless("mapping?", _FUSED),
    "use_cache": harmless("bool", "training needs no cache of keys and values"),
    "torch_empty_cache_steps": harmless("int?", "the cache is emptied when memory runs out"),
    "auto_find_batch_size": Argument("bool"),
    # --- logs
    "logging_strategy": Argument("epoch|no|steps"),
    "logging_steps": Argument("float", range=_STEPS),
    "logging_first_step": Argument("bool"),
    "log_on_each_node": harmless("bool", "rank 0 logs the steps", True, False),
    "logging_nan_inf_filter": harmless("bool", "a loss that is not finite ends the run", True, False),
    "include_num_input_tokens_seen": Argument("str", range=Range("all|no|non_padding")),
    "log_level": Argument("str", range=_LEVEL),
    "log_level_replica": Argument("str", range=_LEVEL),
    "disable_tqdm": harmless("bool?", "progress is a line in the log, or a bar on a terminal", True, False),
    "report_to": Argument("list?"),
    "run_name": Argument("str?"),
    "project": Argument("str"),
    "trackio_space_id": Argument("str?"),
    "trackio_bucket_id": Argument("str?"),
    "trackio_static_space_id": Argument("str?"),
    # --- held-out rows
    "eval_strategy": Argument("epoch|no|steps"),
    "eval_steps": Argument("float?", range=_STEPS),
    "eval_delay": Argument("float", range=Range()),
    "per_device_eval_batch_size": harmless("int", "passes over held-out rows are as large as in training", 8),
    "prediction_loss_only": harmless("bool", _METRIC, True, False),
    "eval_on_start": harmless("bool", "the held-out loss is always measured before training", True, False),
    "eval_do_concat_batches": harmless("bool", _METRIC, True),
    "eval_use_gather_object": harmless("bool", _METRIC),
    "eval_accumulation_steps": harmless("int?", _METRIC),
    "include_for_metrics": harmless("list", _METRIC),
    "batch_eval_metrics": harmless("bool", _METRIC),
    "load_best_model_at_end": Argument("bool"),
    "metric_for_best_model": Argument("str?"),
    "greater_is_better": Argument("bool?"),
    # --- checkpoints
    "save_only_model": harmless("bool", "a checkpoint holds all that an exact resume needs"),
    "save_strategy": Argument("best|epoch|no|steps"),
    "save_steps": Argument("float", range=_STEPS),
    "save_on_each_node": harmless("bool", "every node gets the checkpoints that it needs to resume"),
    "save_total_limit": Argument("int?", range=_COUNT),
    "enable_jit_checkpoint": harmless("bool", "SIGTERM always takes a checkpoint", True, False),
    "ignore_data_skip": harmless(
        "bool", "a resumed run goes on with the next row, without reading the others"
    ),
    "restore_callback_states_from_checkpoint": harmless("bool", "a resumed run goes on exactly", True, False),
    "resume_from_checkpoint": Argument("str?"),
    # --- hub
    "push_to_hub": refused("bool", "the adapter is pushed to 'output.image', not to a hub"),
    "hub_token": refused("str?", _TOKEN, "<HUB_TOKEN>"),
    "hub_private_repo": harmless("bool?", _HUB),
    "hub_model_id": harmless("str?", _HUB),
    "hub_strategy": harmless("all_checkpoints|checkpoint|end|every_save", _HUB, "every_save"),
    "hub_always_push": harmless("bool", _HUB),
    "hub_revision": harmless("str?", _HUB),
    # --- reproducibility
    "full_determinism": Argument("bool"),
    "seed": Argument("int", range=_SEED),
    "data_seed": Argument("int?", range=_SEED),
    # --- data loading, which is the plan's (data/batching.py)
    "dataloader_drop_last": Argument("bool"),
    "dataloader_num_workers": harmless("int", _LOADER, 0),
    "dataloader_pin_memory": harmless(
        "bool", "passes are copied from pinned memory wherever it helps", True, False
    ),
    "dataloader_persistent_workers": harmless("bool", _LOADER),
    "dataloader_prefetch_factor": harmless("int?", _LOADER),
    "dataloader_multiprocessing_context": harmless("str?", _LOADER),
    "dataloader_in_order": harmless("bool", "the order of rows is that of the seed", True),
    "remove_unused_columns": harmless("bool", "only token ids and labels reach the model", True, False),
    "label_names": harmless("list?", "the labels are the tokens of the answers"),
    "train_sampling_strategy": Argument(
        "str", range=Range("random|sequential|group_by_length|batch_rebalance")
    ),
    "length_column_name": harmless("str", "lengths are those of the encoded rows", "length"),
    # --- processes
    "use_cpu": Argument("bool"),
    "accelerator_config": Argument("mapping?", "harmless", keys=_ACCELERATOR),
    "parallelism_config": refused("str?", "tensor and context parallelism are not supported here"),
    "ddp_find_unused_parameters": Argument("bool?"),
    "ddp_bucket_cap_mb": Argument("int?", range=_COUNT),
    "ddp_broadcast_buffers": Argument("bool?"),
    "ddp_static_graph": refused("bool?", "the passes of a step vary in number and size; leave it out"),
    "ddp_backend": harmless("str?", "NCCL connects GPUs, gloo CPUs"),
    "ddp_timeout": harmless("int", "ranks wait up to 3 hours for one another", 1800),
    "fsdp": Argument("str?"),
    "fsdp_config": Argument("mapping?", "harmless", keys=_FSDP),
    "deepspeed": refused(
        "mapping?", "DeepSpeed is not part of this image; several GPUs work through DDP or FSDP"
    ),
    "debug": refused(
        "list", "a loss or gradient that is not finite ends the run with its step; leave it out"
    ),
    "skip_memory_metrics": harmless("bool", "the report holds the peak memory", True, False),
    "do_train": harmless("bool", "the adapter is trained", True, False),
    "do_eval": harmless("bool", "held-out rows are always measured", True, False),
    "do_predict": harmless("bool", "the report shows answers before and after training"),
    "local_rank": harmless("int", "torchrun sets LOCAL_RANK", *range(-1, 1024)),
}
"""Every argument of transformers 5.23's class."""

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
"""Names of older transformers for arguments of today."""

OLDER: dict[str, Argument] = {
    "overwrite_output_dir": harmless("bool", "an interrupted run of the same job is resumed", True, False),
    "save_safetensors": harmless("bool", "only safetensors are written", True),
    "logging_dir": harmless("str?", "loggers write below the output folder"),
    "fp16_opt_level": harmless("str?", "PyTorch computes mixed precision", "O1"),
    "half_precision_backend": harmless("str?", "PyTorch computes mixed precision", "auto"),
    "fp16_backend": harmless("str?", "PyTorch computes mixed precision", "auto"),
    "tpu_num_cores": harmless("int?", _OTHER_DEVICE),
    "tpu_metrics_debug": harmless("bool", _OTHER_DEVICE),
    "use_mps_device": refused("bool", _OTHER_DEVICE),
    "use_ipex": harmless("bool", _OTHER_DEVICE),
    "xpu_backend": harmless("str?", _OTHER_DEVICE),
    "past_index": harmless("int", "the models here return no past state", -1),
    "jit_mode_eval": harmless("bool", _FUSED),
    "torchdynamo": refused("str?", _COMPILED),
    "ray_scope": harmless("str?", "no hyperparameters are searched", "last"),
    "mp_parameters": harmless("str?", "no SageMaker library is used"),
    "split_batches": harmless("bool?", "a batch size is that of each device"),
    "dispatch_batches": harmless("bool?", "every rank has the rows", True, False),
    "include_tokens_per_second": harmless("bool", "tokens per second are always logged", True, False),
    "include_inputs_for_metrics": harmless("bool", _METRIC),
    "sharded_ddp": refused("str?", "use fsdp"),
    "fsdp_min_num_params": harmless("int", "layers are sharded whole", 0),
    "fsdp_transformer_layer_cls_to_wrap": harmless("str?", "layers are sharded whole"),
    "adafactor": refused("bool", "write optim: adafactor"),
    "push_to_hub_model_id": harmless("str?", _HUB),
    "push_to_hub_organization": harmless("str?", _HUB),
    "push_to_hub_token": refused("str?", _TOKEN, "<PUSH_TO_HUB_TOKEN>"),
}
"""Arguments of older transformers that went without a successor."""

_ENCODING = "rows are encoded by this project's own code"
SFT: dict[str, Argument] = {
    "max_length": Argument("int?"),
    "max_seq_length": Argument("int?"),
    "packing": Argument("bool"),
    "eval_packing": harmless("bool?", "held-out rows are laid out as in training", True, False),
    "packing_strategy": refused("str", "rows are packed whole; leave it out", "bfd", "ffd"),
    "padding_free": harmless("bool", "packed rows have no padding", True, False),
    "pad_to_multiple_of": harmless("int?", "a pass is as wide as its rows"),
    "assistant_only_loss": Argument("bool"),
    "completion_only_loss": Argument("bool?"),
    "dataset_text_field": Argument("str"),
    "shuffle_dataset": refused("bool", "write DatasetConfig.shuffle_dataset"),
    "truncation_mode": harmless("str", "the oldest turns are cut, and the last question stays", "keep_start"),
    "dataset_num_proc": harmless("int?", _ENCODING),
    "dataset_batch_size": harmless("int?", _ENCODING, 1000),
    "dataset_kwargs": harmless("mapping?", _ENCODING),
    "num_of_sequences": harmless("int", _ENCODING, 1024),
    "chars_per_token": harmless("float", _ENCODING, 3.6),
    "model_init_kwargs": refused("mapping?", "write them in the section ModelConfig"),
    "chat_template_path": refused("str?", "write ModelConfig.chat_template"),
    "eos_token": refused("str?", "the end of a turn is the chat template's; set ModelConfig.chat_template"),
    "pad_token": harmless("str?", "padding is masked, whichever token it is"),
    "loss_type": refused("str", "the loss is the cross-entropy of the labelled tokens", "nll", "chunked_nll"),
    "activation_offloading": refused("bool", "use gradient_checkpointing: true"),
    "use_liger": harmless("bool", _FUSED),
}
"""Names of trl's SFTConfig; those that are honoured say how rows are encoded: see `sft_settings`."""

_OTHERS = {**OLDER, **SFT}

HONOURED = frozenset(name for name, argument in {**ARGUMENTS, **SFT}.items() if argument.fate == "honoured")
"""Names of those that have an effect."""


def check(training: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the section's arguments that are honoured, each of its right type and in its range.

    ConfigError for the first that is unknown, wrong, or refused; `where` names the file and section in it.
    SFTConfig's names for rows are left to `sft_settings`.
    """
    checked: dict[str, Any] = {}
    for name, (written, value) in _renamed(training, where).items():
        argument = _find(name, written, where)
        if value is None and not argument.kind.endswith("?"):
            continue  # a key without a value
        heeded = honoured(value, argument, f"{where}: '{written}'")
        if (
            name in ARGUMENTS
            and argument.fate == "honoured"
            and (heeded is not None or value in (None, "null"))
        ):
            checked[name] = heeded
    if checked.get("fp16") and checked.get("bf16"):
        raise ConfigError(f"{where}: 'fp16' and 'bf16' are both true, expected at most one of them")
    if checked.get("report_to", ()) is None:
        checked["report_to"] = ["none"]
    loggers.known(checked.get("report_to") or (), where)
    for strategy, steps in (("save_strategy", "save_steps"), ("eval_strategy", "eval_steps")):
        if checked.get(steps) is not None and strategy not in checked:
            checked[strategy] = "steps"
    return checked


def is_sharded(value: Any, what: str) -> bool:
    """Return whether `fsdp` asks for sharding; ConfigError when for another kind than ours."""
    words = value if isinstance(value, list | tuple) else str(value or "").replace(",", " ").split()
    wanted = {str(word).lower() for word in words} - {"false", "no", "none", ""}
    if not wanted <= {"true", "full_shard", "auto_wrap"}:
        raise ConfigError(
            f"{what} is {describe(value)}, expected full_shard: a rank holds a shard of all frozen weights"
        )
    return bool(wanted)


def without_effect(training: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of each argument that asks for something, but has no effect here."""
    for name, (written, value) in _renamed(training, where).items():
        yield from kinds.without_effect(written, value, _find(name, written, where))


def _find(name: str, written: str, where: str) -> Argument:
    argument = ARGUMENTS.get(name) or _OTHERS.get(name)
    if argument is None:
        hint = nearest(written, ARGUMENTS.keys() | SFT.keys())
        expected = hint or "; expected an argument of transformers.TrainingArguments"
        raise ConfigError(f"{where}: unknown key '{written}'{expected}")
    return argument


def _renamed(training: Mapping[str, Any], where: str) -> dict[str, tuple[str, Any]]:
    """Return today's name -> (name as written, value).

    Files that were written by older versions have both names: the one that asks for something counts.
    """
    found: dict[str, tuple[str, Any]] = {}
    for written, given in training.items():
        name = RENAMED.get(written, written)
        value = _translated(written, given, where)
        earlier, other = found.get(name, (written, None))
        if value in _ASKS_NOTHING and other not in _ASKS_NOTHING:
            continue
        if value != other and other not in _ASKS_NOTHING:
            raise ConfigError(f"{where}: '{earlier}' and '{written}' are both set, expected one of them")
        found[name] = (written, value)
    return found


_ASKS_NOTHING = (None, 0, "no", "random")


def _translated(written: str, value: Any, where: str) -> Any:
    """Return the value of today's argument for an older one's."""
    if written == "group_by_length":
        return "group_by_length" if read(value or False, "bool", f"{where}: '{written}'") else "random"
    if written == "warmup_ratio" and value is not None:
        ratio = read(value, "float", f"{where}: '{written}'")
        if not 0 <= ratio < 1:
            raise ConfigError(f"{where}: '{written}' is {ratio:g}, expected a share of the steps below 1")
        return ratio
    if written == "fsdp" and isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if written == "include_num_input_tokens_seen" and str(value).lower() in ("true", "false"):
        return "all" if str(value).lower() == "true" else "no"
    return value


def sft_settings(training: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return the settings {"encoding": {...}, "data": {...}} for SFTConfig's names in the section."""
    given = {
        name: read(training[name], SFT[name].kind, f"{where}: '{name}'")
        for name in SFT
        if SFT[name].fate == "honoured" and training.get(name) is not None
    }
    encoding: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name in ("max_length", "max_seq_length"):
        if given.get(name) is not None:
            encoding["max_tokens"] = given[name]
    if "packing" in given:
        encoding["batching"] = "packed" if given["packing"] else "auto"
    for name in ("assistant_only_loss", "completion_only_loss"):
        if given.get(name) is not None:
            encoding["loss_on"] = "assistant" if given[name] else encoding.get("loss_on", "all")
    if "dataset_text_field" in given:
        data["response_column"] = given["dataset_text_field"]
    return {"encoding": encoding, "data": data}
