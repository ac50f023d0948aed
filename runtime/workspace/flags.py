"""Flags of `runtime tune`, laid over everything else.

`--output` and `--data` take a directory, an address or an image and find out which it is; `--set` names a
setting. Start at `apply`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime import oci
from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.files import kind_of
from runtime.tuning.data import formats
from runtime.tuning.settings import TuningJob
from runtime.workspace.apply import put_training
from runtime.workspace.base_model import put_model
from runtime.workspace.layers import LayeredSettings
from runtime.workspace.names import NOT_SET
from runtime.workspace.sections import SECTIONS


def apply(settings: LayeredSettings, overrides: Mapping[str, Any], where: str) -> None:
    """Lay `overrides` over the settings; errors name the layers below as `where`."""
    if "--output" in overrides:
        _put_output(settings, overrides["--output"])
    if "--data" in overrides:
        _put_data(settings, overrides["--data"])
    names = dotted(overrides)
    if names:
        settings.build(TuningJob, where)  # so that an error below is not blamed on the flags
    for name, value in names.items():
        if not name.startswith("training."):
            _put(settings, name, value)
    _put_training(
        settings, {n.removeprefix("training."): v for n, v in names.items() if n.startswith("training.")}
    )


def dotted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that name a setting of the job itself."""
    return {
        name: value
        for name, value in overrides.items()
        if not name.startswith("--") and name.partition(".")[0] not in SECTIONS
    }


def is_image(word: str) -> bool:
    """Whether `word` is an image reference; a path that exists, or starts like one, never is."""
    return oci.is_image(word) and kind_of(word) is None


def _put(settings: LayeredSettings, name: str, value: Any) -> None:
    head = name.partition(".")[0]
    if head not in TuningJob.model_fields.keys() - NOT_SET:
        known = [*sorted(TuningJob.model_fields.keys() - NOT_SET - {"hub_token"}), *SECTIONS]
        raise ConfigError(
            f"--set {name}: unknown setting{nearest(head, known) or '; known: ' + ', '.join(known)}"
        )
    if head == "hub_token":
        raise ConfigError("--set hub_token: a token must not stand on a command line; set HF_TOKEN")
    if name in ("model", "model.name"):
        put_model(settings, str(value), f"flag --set {name}")
    elif head in ("data", "encoding", "lora", "output", "quantization", "training", "model") and name == head:
        raise ConfigError(f"--set {name}: expected a setting in it, such as {head}.{_first_field(head)}")
    elif name == "data.extension" and value is not None:
        settings.put(name, formats.named(str(value), f"--set {name}"), f"flag --set {name}")
    else:
        settings.put(name, value, f"flag --set {name}")


def _put_training(settings: LayeredSettings, given: Mapping[str, Any]) -> None:
    """Set training arguments: the value of a mapping may also be given key by key."""
    arguments: dict[str, Any] = {}
    for path, value in given.items():
        name, dot, key = path.partition(".")
        before = arguments.get(name, settings.get(f"training.{name}"))
        arguments[name] = {**(before if isinstance(before, dict) else {}), key: value} if dot else value
    put_training(
        settings, arguments, "--set training", lambda key: f"flag --set training.{key.partition('.')[2]}"
    )


def _first_field(head: str) -> str:
    examples = {"training": "learning_rate", "quantization": "bits", "model": "revision"}
    nested = TuningJob.model_fields[head].annotation
    return examples.get(head) or next(iter(nested.model_fields)) if isinstance(nested, type) else "…"


def _put_output(settings: LayeredSettings, words: Iterable[str]) -> None:
    """Set the directory, the image or both; with a directory alone nothing is pushed."""
    images = [word for word in words if is_image(word)]
    folders = [word for word in words if not is_image(word)]
    if len(images) > 1 or len(folders) > 1:
        raise ConfigError(f"--output: expected at most one directory and one image, got {', '.join(words)}")
    if folders and "://" in folders[0]:
        bare = folders[0].split("://", 1)[1]
        raise ConfigError(f"--output {folders[0]}: write an image without the scheme, as {bare}")
    if folders and kind_of(folders[0]) == "file":
        raise ConfigError(f"--output {folders[0]}: is a file; name a directory")
    if folders:
        settings.put("output.folder", Path(folders[0]).expanduser(), "flag --output")
    settings.put("output.image", images[0].removeprefix("docker://") if images else None, "flag --output")


def _put_data(settings: LayeredSettings, words: Iterable[str]) -> None:
    """Set where the rows come from, replacing every other source of data."""
    for key in ("urls", "image", "folder", "file"):
        settings.drop(f"data.{key}")
    urls = tuple(word for word in words if re.match(r"https?://", word))
    if urls:
        if len(urls) != len(list(words)):
            raise ConfigError("--data: addresses and local paths cannot be mixed")
        settings.put("data.urls", urls, "flag --data")
        return
    if len(list(words)) > 1:
        raise ConfigError("--data: expected one file or directory; several are a directory")
    for word in words:
        kind = kind_of(word)
        if kind is not None:
            settings.put(f"data.{kind}", Path(word).expanduser(), "flag --data")
        elif is_image(word):
            settings.put("data.image", word.removeprefix("docker://"), "flag --data")
        else:
            raise ConfigError(f"--data: {word}: no such file or directory")
