"""Layers of settings, merged by order of writing, each remembering where it came from.

Knows dotted names and sources, not what they mean. Start at `Settings.put`.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from runtime.config import Model, flatten, parse
from runtime.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

log = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_HERE\b|<[A-Z][A-Z0-9_ -]+>|\bYOUR_[A-Z0-9_]+\b")
"""What the examples of this field leave for the user to fill in."""


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """A job or a server, with the origin of every setting."""

    job: T
    sources: Mapping[str, str]
    """Dotted setting -> where its value came from, for every setting of `job`."""
    warnings: tuple[str, ...] = ()
    placeholders: tuple[str, ...] = ()
    """Values that the user still has to fill in, one readable phrase each."""

    def ready(self) -> T:
        """Return the job, or raise ConfigError when a placeholder is left in it."""
        if self.placeholders:
            raise ConfigError(f"{self.placeholders[0]}; put the real value there, or look with --dry-run")
        return self.job

    def warn(self) -> None:
        """Write the warnings to the log."""
        for warning in self.warnings:
            log.warning("%s", warning)


@dataclass(slots=True)
class Settings:
    """Values under dotted names; what is put later wins."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any, source: str) -> None:
        """Set `name` to `value`, and forget what was said about it and below it before."""
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
        """Forget `name`, so that its default holds."""
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
        """Add a sentence for the user, once."""
        if warning not in self.warnings:
            self.warnings.append(warning)

    def build(self, model: type[Model], where: str) -> Model:
        """Return the values as a `model`; `where` names their origin in errors."""
        return parse(model, self.values, where)

    def origins(self, job: BaseModel) -> dict[str, str]:
        """Return where each setting of `job` came from, "default" for those nobody set."""
        return {
            name: self._origin(name) for name in flatten(job.model_dump(mode="json", exclude={"sources"}))
        }

    def _origin(self, name: str) -> str:
        while name:
            if name in self.sources:
                return self.sources[name]
            name = name.rpartition(".")[0]
        return "default"


def placeholder(value: str) -> str:
    """Return the placeholders in `value`, such as `IMAGE_NAME_HERE`, joined by "and"; "" when none."""
    return " and ".join(PLACEHOLDER.findall(value))
