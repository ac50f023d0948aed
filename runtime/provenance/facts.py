"""What the files of a folder say about where they come from: a job's report, else an adapter's configuration.

The folder may have been pulled from anywhere, so everything is read as text of unknown kind: what has another
type than expected is left out, and secrets are cut out of what is kept. Start at `Facts.read`.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime import packing
from runtime.logs import printable
from runtime.packing import as_object
from runtime.redaction import redact

log = logging.getLogger(__name__)

_MOST_TEXT = 4096
_MOST_NAME = 200
"""Characters of a key, from its end, by which a text under it may be a secret."""
_MOST_DEPTH = 20
_MOST_SETTINGS = 1 << 20
_HEX_64, _HEX_40 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class NamedDigest:
    """A file by its name and SHA-256."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that an adapter is for."""

    name: str | None
    repository: str | None
    """On the Hugging Face hub."""
    revision: str | None
    commit: str | None
    """40 hex digits: the revision, where it is one, or what it was then."""
    weights_sha256: str | None

    @property
    def version(self) -> str | None:
        """Its commit, else the name of a revision."""
        return self.commit or self.revision

    @property
    def purl(self) -> str | None:
        """Its package URL; None for a model that is not from the hub."""
        if self.repository is None:
            return None
        at = f"@{quote(self.version, safe='')}" if self.version else ""
        return f"pkg:huggingface/{quote(self.repository)}{at}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a folder; None and empty for what is not."""

    job: str | None
    base: BaseModel | None
    data: tuple[NamedDigest, ...]
    settings: Mapping[str, Any]
    scores: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    """Of this project, Python and the libraries, where a job made the folder."""
    packages: Mapping[str, str]
    """All Python packages that were installed there."""

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """Return what the report in `folder` says, and its adapter_config.json where there is none."""
        report = packing.read_object(folder / packing.REPORT)
        result = as_object(report.get("result"))
        losses = as_object(result.get("held_out_loss"))
        scores = {
            "heldOutLossBefore": losses.get("before"),
            "heldOutLossAfter": losses.get("after"),
            "trainLoss": result.get("train_loss"),
            "steps": result.get("steps"),
            "keptStep": result.get("kept_step"),
            "epochs": result.get("epochs"),
        }
        verdict = as_object(report.get("verdict")).get("kind")
        numbers = {key: value for key, value in scores.items() if _is_number(value)}
        return cls(
            job=_text(report.get("job")),
            base=_base(folder, report),
            data=_data(report),
            settings=_settings(folder, report),
            scores=numbers | ({"verdict": _clean(verdict)} if verdict else {}),
            machine=_clean(as_object(report.get("machine"))),
            versions=_strings(report.get("versions")),
            packages=_strings(report.get("packages")),
        )


def _settings(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _clean(as_object(report.get("settings")))
    if len(json.dumps(found)) > _MOST_SETTINGS:
        log.warning("%s: its settings are too many to be stated", folder / packing.REPORT)
        return {}
    return found


def _base(folder: Path, report: Mapping[str, Any]) -> BaseModel | None:
    notes, model = packing.annotations(folder), as_object(report.get("model"))
    revision = notes.get("sh.kaito.model.revision")
    commit = next((each for each in (model.get("commit"), revision) if _matches(_HEX_40, each)), None)
    weights = model.get("weights_sha256")
    found = BaseModel(
        name=_text(notes.get("sh.kaito.model.name")),
        repository=_text(notes.get("sh.kaito.model.repository")),
        revision=_text(revision),
        commit=commit,
        weights_sha256=weights if _matches(_HEX_64, weights) else None,
    )
    return found if found.name or found.repository or found.weights_sha256 else None


def _data(report: Mapping[str, Any]) -> tuple[NamedDigest, ...]:
    files = as_object(report.get("data")).get("files")
    entries = [as_object(each) for each in files] if isinstance(files, list) else []
    return tuple(
        NamedDigest(_text(str(entry.get("name"))) or "", entry["sha256"])
        for entry in entries
        if _matches(_HEX_64, entry.get("sha256"))
    )


def _strings(value: object) -> dict[str, str]:
    found = ((_text(key), _text(text)) for key, text in as_object(value).items())
    return {key: text for key, text in found if key and text}


def _text(value: object) -> str | None:
    """Return a text without secrets, that can be shown and is not long; None for anything else."""
    if not isinstance(value, str) or not value:
        return None
    return redact(printable(value[:_MOST_TEXT]).partition("?")[0])


def _clean(value: Any, name: str = "", depth: int = 0) -> Any:
    """Return JSON without secrets, without what is nested deeper than settings are, and without NaN.

    name: the key that it stands under, by which it may be a secret.
    """
    if isinstance(value, str):
        text = redact(value[:_MOST_TEXT])
        hidden = "[redacted]" in redact(json.dumps({name: text})) and "[redacted]" not in text
        return "[redacted]" if hidden else text
    if depth > _MOST_DEPTH or (isinstance(value, float) and not isfinite(value)):
        return None
    if isinstance(value, dict):
        return {redact(key): _clean(each, key[-_MOST_NAME:], depth + 1) for key, each in value.items()}
    return [_clean(each, name, depth + 1) for each in value] if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return type(value) is int or (isinstance(value, float) and isfinite(value))


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
