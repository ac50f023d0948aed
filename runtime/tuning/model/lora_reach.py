"""Whether all that a LoraConfig names is there: peft passes over names and patterns that match nothing.

Does not know models, only the paths of their modules. Start at `check`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runtime import lora_patterns
from runtime.adapters import LoraFields, lora_config
from runtime.config import parse
from runtime.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig


def check(config: "LoraConfig", paths: Sequence[str]) -> None:
    """Raise ConfigError for a name, pattern or layer of `config` that reaches no module at `paths`."""
    given = {key: getattr(config, key) for key in LoraFields.model_fields}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in given.items()}
    fields = parse(LoraFields, plain, "LoraConfig")
    for key, value in _without_reach(fields, paths):
        raise ConfigError(
            f"LoraConfig.{key}: {value!r} reaches no module of this model, or none that is adapted and "
            "that no earlier pattern has taken; leave it out"
        )


def _without_reach(fields: LoraFields, paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    adapted = sorted(lora_config.targeted(fields, paths))
    for key in ("target_modules", "exclude_modules"):
        names: Any = getattr(fields, key) or []
        for name in [names] if isinstance(names, str) else names:
            one = names if isinstance(names, str) else [name]
            if name != "all-linear" and not lora_patterns.named(one, paths, f"LoraConfig.{key}"):
                yield key, name
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = list(getattr(fields, key) or {})
        used = lora_patterns.pattern_keys(patterns, adapted, f"LoraConfig.{key}").values()
        yield from ((key, pattern) for pattern in patterns if pattern not in used)
    layers = fields.layers_to_transform
    for layer in [layers] if isinstance(layers, int) else layers or []:
        one_layer = fields.model_copy(update={"layers_to_transform": [layer]})
        if not lora_config.targeted(one_layer, paths):
            yield "layers_to_transform", layer
