"""Layers of settings, merged in the order in which they are written; each value remembers its origin.

Knows dotted names and sources, not what they mean. Start at `LayeredSettings.put`.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from runtime.config import Model, flatten, parse
from runtime.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)

log = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_HERE\b|<[A-Z][A-Z0-9_ -]+>|\bYOUR_[A-Z0-9_]+\b")
"""What KAITO's examples, and others, leave for the user to fill in."""


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Config]):
    """A `TuningJob` or a `ServeConfig`, with the origin of every setting."""

    config: Config
    sources: Mapping[str, str]
    """Dotted setting -> where its value came from, for every setting of `config`."""
    warnings: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    """Values that the user still has to fill in, one readable phrase each."""

    def ready(self) -> Config:
        """Return the config, or raise ConfigError when a placeholder is left in it."""
        if self.placeholders:
            values = "the real value" if len(self.placeholders) == 1 else "the real values"
            raise ConfigError(f"{'; '.join(self.placeholders)}; put {values} there, or look with --dry-run")
        return self.config

    @property
    def unfilled(self) -> tuple[str, ...]:
        """A line for each placeholder, for the commands that only show what would run."""
        return tuple(f"placeholder: {phrase}" for phrase in self.placeholders)

    def warn(self) -> None:
        """Write the warnings to the log."""
        for warning in self.warnings:
            log.warning("%s", warning)


@dataclass(slots=True)
class LayeredSettings:
    """Values under dotted names; the last value written wins."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, source: str) -> None:
        """Set `name` to `value`, replacing any earlier values of it and of names below it."""
        *parents, last = name.split(".")
        table = self.values
        for parent in parents:
            if not isinstance(table.get(parent), dict):
                table[parent] = {}
            table = table[parent]
        table[last] = value
        for below in [known for known in self.sources if known.startswith(f"{name}.")]:
            del self.sources[below]
        self.sources[name] = source

    def put_all(self, prefix: str, values: Mapping[str, Any], source: str) -> None:
        """Set every key of `values` below `prefix`."""
        for key, value in values.items():
            self.put(f"{prefix}.{key}", value, source)

    def drop(self, name: str) -> None:
        """Remove `name`, so that its default applies."""
        parent, _, last = name.rpartition(".")
        table = self.get(parent) if parent else self.values
        if isinstance(table, dict):
            table.pop(last, None)
        for known in [known for known in self.sources if f"{known}.".startswith(f"{name}.")]:
            del self.sources[known]

    def get(self, name: str) -> Any:
        """Return the value of `name`, None when it was never set."""
        table: Any = self.values
        for part in name.split("."):
            table = table.get(part) if isinstance(table, dict) else None
        return table

    def warn(self, warning: str) -> None:
        """Add a warning for the user, unless it is there already."""
        if warning not in self.warnings:
            self.warnings.append(warning)

    def warn_all(self, warnings: Iterable[str]) -> None:
        """Add several warnings."""
        for warning in warnings:
            self.warn(warning)

    def build(self, model: type[Model], where: str) -> Model:
        """Return the values as a `model`; `where` names their origin in errors."""
        return parse(model, self.values, where)

    def origins(self, config: BaseModel) -> dict[str, str]:
        """Return where each setting of `config` came from, "default" for those that no layer set."""
        return {
            name: self._origin(name) for name in flatten(config.model_dump(mode="json", exclude={"sources"}))
        }

    def _origin(self, name: str) -> str:
        while name:
            if name in self.sources:
                return self.sources[name]
            name = name.rpartition(".")[0]
        return "default"


def find_placeholders(value: str) -> str:
    """Return the placeholders in `value`, such as `IMAGE_NAME_HERE`, joined by "and"; "" when none."""
    return " and ".join(PLACEHOLDER.findall(value))
