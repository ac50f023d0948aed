"""What a model's weight files hold, and whether a model that was read from them is whole.

transformers fills a parameter that no file has with random numbers and goes on. Here that is a refusal by
name, before anything is trained or answered with it. Does not know where models come from (models.py).
Start at `check_files` and `check_loaded`.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import model_files
from runtime.errors import ConfigError, one_line
from runtime.logs import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = 3
"""Tensors that a message names before it counts the rest."""


def check_files(folder: Path) -> None:
    """Raise ConfigError where a weight file of a model directory is cut short, or one of its index missing.

    Reads the headers, which say how long each file is; not the weights.
    """
    from safetensors import SafetensorError, safe_open

    for name in _indexed(folder):
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"model directory {folder}: {INDEX} names {name!r}, which is no file beside it")
        if not (folder / name).is_file():
            raise ConfigError(f"model directory {folder}: {name}, which {INDEX} names, is missing")
        if not name.endswith(WEIGHTS.removeprefix("*")):
            raise ConfigError(
                f"model directory {folder}: {INDEX} names {name}; weights are read from {WEIGHTS} alone,"
                " since pickles can run code"
            )
    for path in sorted(folder.glob(WEIGHTS)):
        try:
            with safe_open(str(path), framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged or half-written: {one_line(error, 200)}") from None


def _indexed(folder: Path) -> Sequence[Any]:
    """Return what the index of a model directory names as weight files; () without an index."""
    path = folder / INDEX
    if not path.is_file():
        return ()
    try:
        return list(dict.fromkeys(model_files.read_object(path)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no index of weights: {one_line(error, 200)}") from None


def check_loaded(model: "PreTrainedModel", info: dict[str, Any], *, name: str, folder: Path) -> None:
    """Raise ConfigError where `model` lacks weights or has some of another shape; say which were left out.

    `info` is what `from_pretrained` returns with `output_loading_info`: the keys that the architecture
    itself lets be absent or further are no longer in it.
    """
    what = f"model {name} in {folder}"
    if missing := set(info["missing_keys"]):
        raise ConfigError(
            f"{what}: its files have no {_some(missing)}; expected every weight of {type(model).__name__}"
            + _further(info["unexpected_keys"])
        )
    shapes = [(key, tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"]]
    shapes += list(_misshapen(model))
    if shapes:
        key, found, expected = min(shapes)
        raise ConfigError(
            f"{what}: {key} has the shape {found} in its files, and config.json makes it {expected}"
        )
    if errors := [*info["error_msgs"], *info.get("conversion_errors", ())]:
        raise ConfigError(f"{what}: {one_line(errors[0], 400)}")
    say_unread(model, info["unexpected_keys"], what=what)


def say_unread(model: "PreTrainedModel", names: Collection[str], *, what: str) -> None:
    """Log which tensors of the files of `what` were not read, if any."""
    if names:
        count, kind = counted(len(names), "tensor"), type(model).__name__
        log.warning("%s: %s of its files not read: %s has no %s", what, count, kind, _some(names))


def _misshapen(model: "PreTrainedModel") -> Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield (name, shape in the files, expected shape) of layers that bitsandbytes quantised.

    Their weights are packed while they are read, and transformers compares them no more.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            weight: Any = module.weight
            found = tuple(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))
            if found != (expected := (module.out_features, module.in_features)):
                yield f"{name}.weight", found, expected


def _further(unexpected: Collection[str]) -> str:
    """Return the end of a message about missing weights: what the files have instead."""
    return f"; they have {_some(unexpected)}, which it does not know" if unexpected else ""


def _some(names: Collection[str]) -> str:
    shown = sorted(names)
    rest = f" and {len(shown) - NAMED} more" if len(shown) > NAMED else ""
    return ", ".join(shown[:NAMED]) + rest
