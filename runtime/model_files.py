"""The JSON files of a model directory, read and checked before a library builds anything of them.

A model may come from anybody: what a library makes of a text where it expects a number, of a list where it
expects an object or of a billion layers is a traceback, a full memory or a wrong answer. Here it is one line
that names file, key, value and what was expected. Keys that no table below has are the library's matter. Does
not know where models come from (models.py) or what their numbers mean. Start at `check`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import describe
from runtime.errors import ConfigError

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"

MOST_BYTES = {TOKENIZER: 512 << 20, TOKENIZER_CONFIG: 64 << 20}
"""Of these two, which hold a vocabulary or parts of it."""
MOST_CONFIG_BYTES = 16 << 20
"""Of the others, and of an index of weights."""

Check = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class ValueKind:
    """What a key may hold beside null."""

    expected: str
    holds: Check


def _whole(least: int, most: int, *, several: bool = False) -> ValueKind:
    """Return a whole number of that range; `several` allows a list of them, one for each layer."""

    def one(value: Any) -> bool:
        # As files of other libraries have it, `64.0` is none: transformers would compute with it.
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def holds(value: Any) -> bool:
        return one(value) or (several and isinstance(value, list) and bool(value) and all(map(one, value)))

    return ValueKind(
        f"a whole number from {least} to {most}" + (", or a list of them" if several else ""), holds
    )


def _number(least: float, most: float, expected: str) -> ValueKind:
    def holds(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and least <= value <= most

    return ValueKind(expected, holds)


def _instance(expected: str, *kinds: type) -> ValueKind:
    return ValueKind(expected, lambda value: isinstance(value, kinds))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


MOST = 2**31 - 1
SIZE, COUNT = _whole(1, 1 << 24, several=True), _whole(1, 10_000, several=True)
ID = _whole(-1, MOST)
"""-1 stands for none, in files of older conversions."""
TEXT, OBJECT = _instance("text", str), _instance("an object", dict)
BOOLEAN = _instance("true or false", bool)
POSITIVE = _number(1e-30, 1e30, "a number above 0")
SHARE = _number(0.0, 1.0, "a number from 0 to 1")
DTYPE = ValueKind(
    "a type of numbers, such as bfloat16",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"(torch\.)?[a-z0-9_]{3,20}", value)),
)
IDS = ValueKind(
    "an id of a token, or a list of them",
    lambda v: ID.holds(v) or (isinstance(v, list) and all(map(ID.holds, v))),
)
NAME = ValueKind(
    "a name of letters, digits, '_', '-' and '.'",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", value)),
)
TOKEN = _instance("text, or an object that holds it", str, dict)

CONFIG_KEYS: Mapping[str, ValueKind] = {
    "model_type": NAME,
    "architectures": ValueKind("a list of names", _texts),
    "auto_map": OBJECT,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "quantization_config": OBJECT,
    "text_config": OBJECT,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "rope_theta": POSITIVE,
    "rms_norm_eps": POSITIVE,
    "layer_norm_eps": POSITIVE,
    "layer_norm_epsilon": POSITIVE,
    "hidden_size": SIZE,
    "n_embd": SIZE,
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "ffn_hidden_size": SIZE,
    "ffn_dim": SIZE,
    "vocab_size": _whole(1, 1 << 28),
    "num_hidden_layers": COUNT,
    "n_layer": COUNT,
    "num_attention_heads": COUNT,
    "n_head": COUNT,
    "num_key_value_heads": COUNT,
    "num_kv_heads": COUNT,
    "head_dim": _whole(1, 1 << 16),
    "max_position_embeddings": _whole(1, MOST),
    "n_positions": _whole(1, MOST),
    "sliding_window": _whole(0, MOST),
    "layer_types": ValueKind("a list of names", _texts),
    "tie_word_embeddings": BOOLEAN,
    "multi_query": BOOLEAN,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    "pad_token_id": ID,
}
GENERATION_KEYS: Mapping[str, ValueKind] = {
    "temperature": _number(0.0, 100.0, "a number from 0 to 100"),
    "top_p": SHARE,
    "min_p": SHARE,
    "top_k": _whole(-1, MOST),
    "repetition_penalty": _number(1e-6, 100.0, "a number above 0, up to 100"),
    "do_sample": BOOLEAN,
    "max_length": _whole(0, MOST),
    "max_new_tokens": _whole(0, MOST),
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    "pad_token_id": IDS,
}
TOKENIZER_KEYS: Mapping[str, ValueKind] = {
    "tokenizer_class": TEXT,
    "auto_map": OBJECT,
    "model_max_length": _number(1, math.inf, "a number from 1"),
    "chat_template": ValueKind(
        "a template, or a list of objects with name and template",
        lambda value: (
            isinstance(value, str | dict) or (isinstance(value, list) and all(map(_is_named_template, value)))
        ),
    ),
    "added_tokens_decoder": ValueKind(
        "an object of objects, by token id",
        lambda value: (
            isinstance(value, dict)
            and all(key.isdecimal() and isinstance(token, dict) for key, token in value.items())
        ),
    ),
    "extra_special_tokens": _instance("an object or a list", dict, list),
    "additional_special_tokens": _instance("a list of tokens", list),
    "padding_side": ValueKind("left or right", lambda value: value in ("left", "right")),
    "truncation_side": ValueKind("left or right", lambda value: value in ("left", "right")),
    **{f"{name}_token": TOKEN for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    "add_bos_token": BOOLEAN,
    "add_eos_token": BOOLEAN,
}
SPECIAL_KEYS: Mapping[str, ValueKind] = {
    name: kind for name, kind in TOKENIZER_KEYS.items() if name.endswith(("_token", "_tokens"))
} | {"extra_special_tokens": _instance("an object or a list", dict, list)}


def _is_named_template(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("template"), str)
    )


def check(folder: Path) -> None:
    """Raise ConfigError where a JSON file of a model is none, or a known key holds something odd."""
    if (folder / CONFIG).is_file():
        read_config(folder / CONFIG)
    for name, kinds in (
        (GENERATION, GENERATION_KEYS),
        (TOKENIZER_CONFIG, TOKENIZER_KEYS),
        (SPECIAL_TOKENS, SPECIAL_KEYS),
    ):
        path = folder / name
        if path.is_file():
            _check_keys(read_object(path), kinds, path)
    if (folder / TOKENIZER).is_file():
        _check_size(folder / TOKENIZER)  # its reader, in Rust, says the line and column of what is wrong


def read_config(path: Path) -> dict[str, Any]:
    """Return a config.json; ConfigError where it is none or a known key holds something odd."""
    config = read_object(path)
    _check_keys(config, CONFIG_KEYS, path)
    if isinstance(text := config.get("text_config"), dict):
        _check_keys(text, CONFIG_KEYS, path, "text_config.")
    if "model_type" not in config and "auto_map" not in config:
        raise ConfigError(f"{path}: 'model_type' is missing, expected transformers' name of the model's kind")
    for outer in ("", "text_config."):
        of = config if not outer else config.get("text_config") or {}
        for key in ("rope_scaling", "rope_parameters"):
            for name in ("factor", "rope_theta"):
                _check_key(of.get(key) or {}, name, POSITIVE, path, f"{outer}{key}.")
    _check_key(config.get("quantization_config") or {}, "quant_method", TEXT, path, "quantization_config.")
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; ConfigError, which names what is wrong, where it is none."""
    _check_size(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from None
    except _TwiceError as error:
        raise ConfigError(f"{path}: the key {error} is written twice") from None
    except ValueError:  # Python reads no number as long as that
        raise ConfigError(f"{path}: not valid JSON: a number of more than 4,300 digits") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {describe(document)}, expected an object")
    return document


class _TwiceError(Exception):
    """A key of an object is written twice: libraries take one or the other."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _TwiceError(describe(twice))
    return found


def _check_size(path: Path) -> None:
    most = MOST_BYTES.get(path.name, MOST_CONFIG_BYTES)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if size > most:
        raise ConfigError(f"{path}: has {size} bytes, expected at most {most}")


def _check_keys(
    values: Mapping[str, Any], kinds: Mapping[str, ValueKind], path: Path, prefix: str = ""
) -> None:
    for key, kind in kinds.items():
        _check_key(values, key, kind, path, prefix)


def _check_key(values: Mapping[str, Any], key: str, kind: ValueKind, path: Path, prefix: str = "") -> None:
    value = values.get(key)
    if value is not None and not kind.holds(value):
        raise ConfigError(f"{path}: '{prefix}{key}' is {describe(value)}, expected {kind.expected}")
