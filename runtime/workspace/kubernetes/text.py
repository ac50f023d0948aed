"""Objects as YAML that people read, without keys that have no value. Start at `dump`."""

import re
from collections.abc import Iterable
from typing import Any

import yaml


def dump(documents: Iterable[Any]) -> str:
    """Return the documents as YAML, texts of several lines as blocks."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes multi-line texts as block scalars, and indents lists."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: object) -> bool:
        return True


_LIKE_A_NUMBER = re.compile(r"[-+.]?\d[-+.:_\da-fA-FxXoO]*|[yYnN]")
"""Texts that some reader of YAML takes for a number, a time or a boolean: 1e5, 0o17, 2026-11-30, y."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if _LIKE_A_NUMBER.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def without_nulls(value: Any) -> Any:
    """Return `value` without keys that have no value, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
