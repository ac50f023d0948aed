"""Reads YAML, JSON and TOML into strict, frozen pydantic models, and explains a mistake in one line.

Knows formats, not what the values are for. Start at `Strict` and `parse`.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from runtime.errors import ConfigError


class Strict(BaseModel):
    """Base class of all data from outside: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Sparse(Strict):
    """Base class of what users write for Kubernetes: a known key without a value is as if it were not there.

    An unknown one is refused like any other: `{name:phi-4}`, with no space, is the key 'name:phi-4'.
    """

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in data.items() if value is not None or key not in known}


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `values` that have a value."""
    return {key: value for key, value in values.items() if value is not None}


Model = TypeVar("Model", bound=BaseModel)

MOST_VALUES = 100_000
"""Values of a document with its aliases written out: a few lines of YAML can stand for billions."""
MOST_BRACKETS = 100
"""Of `[` and `{` inside one another: the scanner's time grows with their square."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses duplicate keys, and aliases that grow without bounds.

    `1e-5` is a number, and `no` stays a string: `save_strategy: no` means the strategy "no", while a
    boolean field still takes `no` for false (pydantic reads it).
    """

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # Here and not in construct_mapping: merging (`<<`) writes the merged keys into the nodes themselves.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"key {key.value!r} is written twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 - the scanner's name
        if self.flow_level >= MOST_BRACKETS:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError):  # of an explicit tag, as in `!!int x`
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            problem = f"{describe(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def compose_document(self) -> yaml.Node | None:
        document = super().compose_document()
        if document is not None and _count(document, {}) > MOST_VALUES:
            problem = f"stands for more than {MOST_VALUES} values"
            raise yaml.composer.ComposerError(None, None, problem, document.start_mark)
        return document


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return how many values `node` stands for once its aliases are written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # found again below itself: without end
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        )
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]


_FLOAT = re.compile(
    r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+)$")  # 1:30 is text
_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] not in _REPLACED]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))


def read_text(path: Path) -> str:
    """Return the text of `path`; ConfigError when it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, expected a file") from None
    except PermissionError:
        raise ConfigError(f"{path}: permission denied; make it readable for this user") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None


def yaml_documents(text: str, where: str) -> list[dict[str, Any]]:
    """Return the non-empty YAML documents of `text`, or its JSON objects, each a mapping.

    `where` names the file in errors.
    """
    try:
        text = text.replace("\n\ufeff", "\n")  # of files that were joined; the reader drops the first
        documents = _json_objects(text) or [d for d in yaml.load_all(text, Loader=_Loader) if d is not None]
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {_problem(error, text)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None
    except ValueError:  # of JSON: Python reads no number as long as that
        raise ConfigError(f"{where}: not valid JSON: a number of more than 4,300 digits") from None
    for document in documents:
        if not isinstance(document, dict):
            raise ConfigError(f"{where}: expected keys and values, found {describe(document)}")
    return documents


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return what is wrong, in the words of the file rather than the parser's."""
    written = text.splitlines()[error.problem_mark.line :][:1] if error.problem_mark else []
    if "'\\t'" in str(error.problem):
        return "a tab; indent with spaces"
    if any("{{" in line or "${" in line for line in written):
        return "a variable of a template ({{ }} or ${ }) has not been replaced; render the template first"
    return str(error.problem)


_AFTER = re.compile(r"\s*")


def _json_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of `text` where it is JSON: indented with tabs it is no YAML; [] otherwise."""
    text, at, found = text.strip("\ufeff \t\r\n"), 0, []
    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)
    try:
        while text.startswith("{", at):
            value, end = decoder.raw_decode(text, at)
            found.append(value)
            at = next(_AFTER.finditer(text, end)).end()
    except json.JSONDecodeError:
        return []  # YAML's flow style
    return found if at == len(text) else []


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is written twice", None)
    return values


def toml_document(text: str, where: str) -> dict[str, Any]:
    """Return the TOML table of `text`; `where` names the file in errors."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from None


def parse(model: type[Model], data: Any, where: str) -> Model:
    """Return `data` as a `model`; ConfigError naming file, key, value and expectation otherwise."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, where)) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested `values` under dotted names; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return " (did you mean 'a' or 'b'?)" for the known words closest to `word`, or "".

    `cutoff` is the least likeness; names that are alike anyhow, as those of machines, need a higher one.
    """
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=cutoff)
    return f" (did you mean {' or '.join(repr(lowered[name]) for name in close)}?)" if close else ""


def describe(value: Any) -> str:
    """Return a short description of `value` in the terms of a YAML file."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | set):
        return "a list"
    if isinstance(value, date):
        return f"the date {value}"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


_EXPECTED = {
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "list_type": "a list, as in [a, b]",
    "string_type": "text, written in quotes where it looks like something else",
    "string_unicode": "text",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
}
"""What is expected, by pydantic's kind of error, where its own words are those of Python."""


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    problems = error.errors(include_url=False, include_context=True)
    # An unknown key often is the missing one misspelt, or in the wrong place.
    problems.sort(key=lambda problem: problem["type"] not in ("extra_forbidden", "invalid_key"))
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        hint = nearest(str(first["loc"][-1]), known) or f"; known: {', '.join(sorted(known))}"
        return f"{where}: unknown key '{path}'{hint}{more}"
    if first["type"] == "missing":
        return f"{where}: '{path}' is missing{more}"
    if first["type"] == "invalid_key" or first["loc"][-1:] == ("[key]",):
        return f"{where}: the key {describe(first['input'])} in '{path}' is no text; write it in quotes{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] in _EXPECTED:
        message = f"is {describe(first['input'])}, expected {_EXPECTED[first['type']]}"
    elif first["type"] != "value_error":
        message = f"is {describe(first['input'])}: {message}"
    return f"{where}: '{path}' {message}{more}" if path else f"{where}: {message}{more}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Return the keys (aliases first) that `model` takes at `location`, for the nearest-name hint."""
    kinds: list[Any] = [model]
    for part in location:
        following: list[Any] = []
        for kind in kinds:
            fields = [item for found in _models_in(kind) for item in found.model_fields.items()]
            annotations = [field.annotation for name, field in fields if part in (name, field.alias)]
            following += annotations or [kind]  # a list index or a mapping key names no field
        kinds = following
    return {
        field.alias or name
        for kind in kinds
        for found in _models_in(kind)
        for name, field in found.model_fields.items()
    }


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
