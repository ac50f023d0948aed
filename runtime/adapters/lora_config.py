"""peft's LoraConfig: which keys decide what an adapter computes, and what serving and merging make of them.

The one home of these facts: tuning says with them what cannot be served later. Does not know files or models.
Start at `LoraFields`, then `not_served` and `not_merged`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from runtime import lora_patterns

PREFIX = "base_model.model."
"""Of the base model's module names in peft's files."""

NOT_SERVED: dict[str, str] = {
    "use_dora": "DoRA scales every row of the weights",
    "lora_bias": "it trains biases",
    "bias": "it trains biases",
    "modules_to_save": "it trains whole modules",
    "trainable_token_indices": "it trains embeddings of single tokens",
    "alora_invocation_tokens": "the adapter begins at certain tokens only",
    "layer_replication": "the model has further layers",
    "target_parameters": "it adapts parameters that are no linear layer",
    "use_qalora": "QA-LoRA adapts averages of the inputs",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "kasa_config": "KaSA changes the base weights",
    "arrow_config": "Arrow chooses among adapters",
    "velora_config": "VeLoRA has weights beside the two matrices",
    "monteclora_config": "MonteCLoRA has weights beside the two matrices",
    "megatron_config": "its layers are Megatron's",
}
"""Key -> why an adapter with it is not served; falsy values, and bias "none", ask for nothing."""

NOT_MERGED: dict[str, str] = {
    "alora_invocation_tokens": "the adapter begins at certain tokens only",
    "layer_replication": "the added layers share their weights",
    "arrow_config": "Arrow chooses among adapters while it answers",
    "megatron_config": "its layers are Megatron's",
}
"""The same for merging: what one set of weights cannot hold, or peft 0.21 merges wrongly."""

WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "runtime_config", "task_type",
})  # fmt: skip
"""Keys that say how an adapter was trained, not what it computes; init_lora_weights see `_CHANGES_BASE`."""

_CHANGES_BASE = {
    "pissa": "serve", "olora": "serve", "loftq": "serve", "pissa_niter": "merge", "corda": "merge",
    "lora_ga": "merge",
}  # fmt: skip
"""Initialisations after which an adapter belongs to another base than it names -> what it cannot be
used for any more: peft computes the first three again where it merges, the others not or not equally."""


class LoraFields(BaseModel):
    """The keys of a LoraConfig that are read here; the others are in NOT_SERVED or WITHOUT_EFFECT."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    r: PositiveInt
    rank_pattern: dict[str, PositiveInt] | None = None
    lora_alpha: float = 8.0
    """peft's own default."""
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


KNOWN = frozenset(LoraFields.model_fields) | NOT_SERVED.keys() | WITHOUT_EFFECT
"""All keys of the installed peft's LoraConfig (a test compares)."""


def ranks(fields: LoraFields, paths: Sequence[str]) -> dict[str, int]:
    """Return the rank of the adapted modules at `paths`; ConfigError for a pattern that cannot be read."""
    pattern = fields.rank_pattern or {}
    keys = lora_patterns.pattern_keys(list(pattern), paths, "rank_pattern")
    return {path: pattern[keys[path]] if path in keys else fields.r for path in paths}


def scalings(fields: LoraFields, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return by what the update of each module is multiplied, given their ranks.

    alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv:2312.03732).
    Raises ConfigError for a pattern that cannot be read.
    """
    pattern, paths = fields.alpha_pattern or {}, list(ranks)
    keys = lora_patterns.pattern_keys(list(pattern), paths, "alpha_pattern")
    alphas = {path: pattern[keys[path]] if path in keys else fields.lora_alpha for path in paths}
    return {path: alphas[path] / (rank**0.5 if fields.use_rslora else rank) for path, rank in ranks.items()}


def targeted(fields: LoraFields, paths: Sequence[str]) -> set[str]:
    """Return those of `paths`, all linear modules of a model, that the adapter reaches.

    Raises ConfigError for a pattern that cannot be read.
    """
    targets = fields.target_modules
    if targets in (None, "all-linear"):
        found = set(paths)
    else:
        found = lora_patterns.named(targets or [], paths, "target_modules")
    if isinstance(targets, list) and fields.layers_to_transform not in (None, []):
        found = _within_layers(fields, found, set(targets))
    if fields.exclude_modules:
        found -= lora_patterns.named(fields.exclude_modules, paths, "exclude_modules")
    return found - lora_patterns.saved(fields.modules_to_save or [], paths, "modules_to_save")


def _within_layers(fields: LoraFields, paths: set[str], whole: set[str]) -> set[str]:
    """Return those of `paths` that layers_to_transform leaves; a module named in full (`whole`) always."""
    layers, names = fields.layers_to_transform, fields.layers_pattern or []
    return (paths & whole) | lora_patterns.within_layers(
        layers if isinstance(layers, list) else [layers or 0],
        [names] if isinstance(names, str) else names,
        sorted(paths),
        "layers_pattern",
    )


def not_served(config: Mapping[str, Any]) -> list[str]:
    """Return why an adapter with this LoraConfig is not served, by key: "use_dora: DoRA scales …"."""
    return _refused(config, NOT_SERVED, ("serve", "merge"))


def not_merged(config: Mapping[str, Any]) -> list[str]:
    """Return why an adapter with this LoraConfig is not merged, by key."""
    return _refused(config, NOT_MERGED, ("merge",))


def _refused(config: Mapping[str, Any], table: Mapping[str, str], fails: tuple[str, ...]) -> list[str]:
    found = [
        f"{key}: {reason}"
        for key, reason in table.items()
        if config.get(key) and not (key == "bias" and config[key] == "none")
    ]
    init = config.get("init_lora_weights")
    kind = "pissa_niter" if isinstance(init, str) and init.startswith("pissa_niter") else init
    if isinstance(kind, str) and _CHANGES_BASE.get(kind.lower()) in fails:
        found.append(f"init_lora_weights is {init!r}: it took a part out of the base weights")
    return found
