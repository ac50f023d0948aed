"""The names of a job's settings on the command line: ours, KAITO's, and what people call them elsewhere.

`--set learning_rate=1e-4` finds the one setting of that name; `lr`, `epochs`, `rank` and others are answered
with the right one. Knows names, not values. Start at `resolve` and `hint`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.tuning.arguments import lora, training
from runtime.tuning.settings import TuningJob
from runtime.workspace import sections

NOT_SET = frozenset({"sources"})
"""Fields of TuningJob that no user sets."""

_SYNONYMS = (
    ("TrainingArguments.learning_rate", "2e-4", "lr learn_rate learningrate"),
    ("TrainingArguments.num_train_epochs", "3", "epochs epoch num_epochs n_epochs max_epochs"),
    ("TrainingArguments.max_steps", "200", "steps num_steps max_iters iters"),
    (
        "TrainingArguments.per_device_train_batch_size",
        "4",
        "batch_size batchsize bs train_batch_size micro_batch_size per_device_batch_size",
    ),
    (
        "TrainingArguments.gradient_accumulation_steps",
        "4",
        "grad_accum accumulation_steps accumulate_grad_batches gradient_accumulation",
    ),
    ("TrainingArguments.optim", "adamw_torch", "optimizer optimiser"),
    ("TrainingArguments.lr_scheduler_type", "cosine", "scheduler lr_scheduler"),
    ("TrainingArguments.warmup_steps", "10", "warmup num_warmup_steps"),
    ("TrainingArguments.gradient_checkpointing", "true", "checkpointing"),
    (
        "TrainingArguments.max_length",
        "1024",
        "max_len max_tokens max_seq_len seq_len seq_length sequence_len sequence_length cutoff_len "
        "context_length block_size model_max_length max_length max_seq_length",
    ),
    ("LoraConfig.r", "16", "rank lora_rank lora_r"),
    ("LoraConfig.use_dora", "true", "dora"),
    ("LoraConfig.use_rslora", "true", "rslora"),
    ("QuantizationConfig.load_in_4bit", "true", "use_qlora qlora use_4bit"),
    ("LoraConfig.lora_alpha", "32", "alpha"),
    ("LoraConfig.lora_dropout", "0.05", "dropout"),
    ("LoraConfig.target_modules", "all-linear", "modules lora_target_modules lora_targets"),
    (
        "DatasetConfig.train_test_split",
        "0.9",
        "train_split train_size test_size val_size eval_size test_split val_split eval_split "
        "validation_split val_set_size",
    ),
)
COMMON_NAMES = {name: (key, example) for key, example, names in _SYNONYMS for name in names.split()}
"""What people call a setting -> KAITO's "Section.key" of it, and an example of its value."""

_NOTES = {"train_test_split": " (the part to train on)"}


def resolve(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides with every setting under its dotted name.

    A name without a dot is that of the one setting which is called so, in whatever section. ConfigError for
    all that several have or that none has, together.
    """
    resolved: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in overrides.items():
        try:
            resolved[name if name.startswith("--") else _resolve(name)] = value
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("; ".join((wrong[0], *(re.sub(r"^--set:? ", "", text) for text in wrong[1:]))))
    return resolved


def _resolve(name: str) -> str:
    head, dot, rest = name.partition(".")
    if head == "training" and rest in _IN_THE_SECTION:
        return f"TrainingArguments.{rest}"
    if name in _MOVED:
        return _MOVED[name]
    if dot:
        _check_dotted(name, head, rest.partition(".")[0])
        return name
    if name in TuningJob.model_fields or name in sections.SECTIONS:
        return name
    found = [f"{group}.{name}" for group, fields in groups().items() if name in fields]
    found = found or [f"{section}.{name}" for section, keys in section_keys().items() if name in keys]
    if len(found) > 1:
        raise ConfigError(f"--set {name}: several settings have this name: {' or '.join(found)}")
    if found:
        return found[0]
    known = {
        *TuningJob.model_fields,
        *sections.SECTIONS,
        *(f for fields in groups().values() for f in fields),
        *(key for keys in section_keys().values() for key in keys),
    }
    unset = NOT_SET | {"hub_token"}
    close = hint(name) or nearest(name, known - unset, cutoff=0.7) or _listed()
    raise ConfigError(f"--set {name}: unknown setting{close}")


_MOVED = {f"ModelConfig.{key}": f"QuantizationConfig.{key}" for key in ("load_in_4bit", "load_in_8bit")}
"""Keys that from_pretrained took once, and that are without effect in a file: stock templates hold them."""


def _check_dotted(name: str, head: str, key: str) -> None:
    if head in sections.SECTIONS:
        check_section(head, [key], "--set")
        if key not in _ALL_KEYS.get(head, (key,)):
            close = nearest(key, _ALL_KEYS[head]) or f"; known: {', '.join(sorted(_ALL_KEYS[head]))}"
            raise ConfigError(f"--set: unknown key '{name}'{close}")
    elif head in groups() and key not in groups()[head]:
        if other := hint(key):
            raise ConfigError(f"--set {name}: unknown setting{other}")
        close = nearest(key, groups()[head]) or f"; known: {', '.join(sorted(groups()[head]))}"
        raise ConfigError(f"--set: unknown key '{name}'{close}")
    elif head not in TuningJob.model_fields:
        known = [*groups(), *sections.SECTIONS]
        raise ConfigError(f"--set {name}: unknown setting{nearest(head, known) or _listed()}")


def _listed() -> str:
    top = sorted(TuningJob.model_fields.keys() - groups().keys() - NOT_SET - {"hub_token"})
    return f"; known: {', '.join(top)} and those below {', '.join([*groups(), *sections.SECTIONS])}"


_IN_THE_SECTION = training.SFT.keys() | training.OLDER.keys() | {"output_dir"}
"""Keys of TrainingArguments that are no arguments of the trainer here: they become other settings."""


def groups() -> dict[str, frozenset[str]]:
    """Return the groups of a job's settings, and the names in each."""
    found: dict[str, frozenset[str]] = {}
    for name, field in TuningJob.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = frozenset(kind.model_fields)
    arguments = training.ARGUMENTS.keys() | training.RENAMED.keys()
    return {**found, "training": frozenset(arguments - _IN_THE_SECTION)}


def section_keys() -> dict[str, frozenset[str]]:
    """Return the keys of each section of training_config.yaml that have an effect."""
    lora_keys = sections.LoraSection.model_fields.keys() | lora.LoraOptions.model_fields.keys()
    return {
        "ModelConfig": frozenset(sections.ModelConfig.model_fields) - sections.MODEL_WITHOUT_EFFECT.keys(),
        "QuantizationConfig": frozenset(sections.QuantizationConfig.model_fields) - {"quant_method"},
        "LoraConfig": frozenset(lora_keys),
        "TrainingArguments": training.HONOURED | training.RENAMED.keys(),
        "DatasetConfig": frozenset(sections.DatasetConfig.model_fields),
    }


def hint(name: str) -> str:
    """Return which setting `name` stands for elsewhere, with an example; "" where nothing is known."""
    target, example = COMMON_NAMES.get(name.lower().replace("-", "_"), ("", ""))
    key = target.partition(".")[2]
    return f"; it is {key} here{_NOTES.get(key, '')}, as in --set {key}={example}" if key else ""


def check_section(section: str, keys: Iterable[str], where: str) -> None:
    """Raise ConfigError for a key that has another name here, or that belongs to another section."""
    for key in keys:
        if section not in _ALL_KEYS or key in _ALL_KEYS[section]:
            continue
        others = [other for other, names in section_keys().items() if key in names]
        target, example = COMMON_NAMES.get(str(key).lower(), ("", ""))
        right_section, _, right_key = target.partition(".")
        if target:
            there = "" if right_section == section else f" in {right_section}"
            note = f"it is '{right_key}'{there}{_NOTES.get(right_key, '')}, as in {right_key}: {example}"
        elif len(others) == 1:
            note = f"'{key}' belongs into {others[0]}"
        else:
            continue
        raise ConfigError(f"{where}: unknown key '{section}.{key}'; {note}")


_ALL_KEYS: Mapping[str, frozenset[str]] = {
    "ModelConfig": frozenset(sections.ModelConfig.model_fields),
    "QuantizationConfig": frozenset(sections.QuantizationConfig.model_fields),
    "LoraConfig": frozenset(sections.LoraSection.model_fields) | lora.KEYS,
    "TrainingArguments": frozenset(
        training.ARGUMENTS.keys() | training.RENAMED.keys() | training.OLDER.keys() | training.SFT.keys()
    ),
    "DatasetConfig": frozenset(sections.DatasetConfig.model_fields),
}
"""Every key that a section may hold, those without effect too."""
