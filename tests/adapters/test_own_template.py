"""The chat template beside an adapter: in any of its three places, checked, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.adapters import own_template
from runtime.errors import ConfigError


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": ""}}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "a"}]}},
            {"default": "a"},
        ),
        (
            {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"},
            {"default": "a", "tool_use": "b"},
        ),
        ({"additional_chat_templates/rag.jinja": "c"}, {"rag": "c"}),
    ],
)
def test_template_is_found_in_any_of_its_places(files: dict[str, Any], template: Any, tmp_path: Path) -> None:
    assert own_template(write(tmp_path, files), "it") == template


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": "{{ 1 / 0 }}"}, "cannot render one question: division by zero"),
        ({"additional_chat_templates/rag.jinja": "{% if"}, "is broken at line 1"),
        (
            {f"additional_chat_templates/{n}.jinja": "a" for n in range(16)},
            "16 files in additional",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default"}]}}, "is no text"),
        ({"tokenizer_config.json": {"chat_template": [{"template": "a"}]}}, "is no text"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "is no text"),
    ],
)
def test_what_is_no_template_is_refused_by_name(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter it: ") as caught:
        own_template(write(tmp_path, files), "it")
    assert said in str(caught.value)
