"""What an adapter says of conversations: the chat template beside it, and the tokens it was trained with.

Both come from outside: files have limits, and a template that cannot be read is refused by name. Templates
are rendered by runtime/chat_template only. Start at `own_template` and `check_tokens`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime import chat_template
from runtime.errors import ConfigError, one_line

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
"""Further templates, a file each: tool_use.jinja, rag.jinja."""
MOST_TEMPLATES = 16
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"

MOST_BYTES = {TEMPLATE_FILE: 1 << 20, TOKENIZER_CONFIG: 16 << 20, TOKENIZER: 128 << 20}
"""Of each file; the largest public templates have 20 KB, tokenizers 33 MB."""
SHOWN = 5

Template = str | dict[str, str]
"""A chat template, or several by name ("default", "tool_use")."""


def own_template(folder: Path, name: str) -> Template | None:
    """Return the chat template of the adapter in `folder`, None where it has none.

    Raises ConfigError, which calls the adapter `name`, for one that is no template.
    """
    if (folder / TEMPLATE_FILE).is_file():
        template: Any = _text(folder / TEMPLATE_FILE, name)
    else:
        template = _document(folder / TOKENIZER_CONFIG, name).get("chat_template")
    if isinstance(template, list) and all(isinstance(each, dict) for each in template):
        template = {each.get("name"): each.get("template") for each in template}
    if further := _further(folder, name):
        default = {chat_template.DEFAULT: template} if isinstance(template, str) else {}
        template = {**(template if isinstance(template, dict) else default), **further}
    named = template if isinstance(template, dict) else {chat_template.DEFAULT: template or ""}
    if len(named) > MOST_TEMPLATES:
        raise ConfigError(f"adapter {name}: {len(named)} chat templates, at most {MOST_TEMPLATES} are read")
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ConfigError(f"adapter {name}: chat_template in {TOKENIZER_CONFIG} is no text")
    for text in filter(None, named.values()):
        _check(text, name)
    return template or None


def _further(folder: Path, name: str) -> dict[str, str]:
    """Return the templates beside the default one, by the names of their files."""
    further = folder / TEMPLATE_FOLDER
    files = sorted(further.glob("*.jinja")) if further.is_dir() else []
    if len(files) >= MOST_TEMPLATES:
        raise ConfigError(
            f"adapter {name}: {len(files)} files in {TEMPLATE_FOLDER}, below {MOST_TEMPLATES} are read"
        )
    return {path.stem: _text(path, name) for path in files}


def check_tokens(folder: Path, name: str, vocabulary: Mapping[str, int]) -> None:
    """Raise ConfigError where the tokenizer beside the adapter has other tokens than the base's `vocabulary`.

    An adapter brings no embeddings for further tokens. One for padding is never in a prompt and passes.
    """
    document = _document(folder / TOKENIZER, name)
    model, added = document.get("model"), document.get("added_tokens") or []
    own: Any = model.get("vocab") if isinstance(model, dict) else None
    tokens = dict(own) if isinstance(own, dict) else {}
    if isinstance(own, list):  # of a unigram model, with a score each
        tokens = {piece[0]: number for number, piece in enumerate(own) if isinstance(piece, list) and piece}
    tokens |= {token.get("content"): token.get("id") for token in added if isinstance(token, dict)}
    padding = _document(folder / TOKENIZER_CONFIG, name).get("pad_token")
    padding = padding.get("content") if isinstance(padding, dict) else padding
    other = [
        token for token, number in tokens.items() if vocabulary.get(token) != number and token != padding
    ]
    if other:
        shown = ", ".join(repr(token) for token in other[:SHOWN]) + (", ..." if len(other) > SHOWN else "")
        raise ConfigError(
            f"adapter {name}: its tokenizer has {len(other)} tokens that the base model has not, or under "
            f"another number ({shown}), and an adapter brings no embeddings for them"
        )


def _check(template: str, name: str) -> None:
    """Raise ConfigError for a template that is no Jinja, takes too much, or cannot render one question."""
    try:
        chat_template.check(template)
    except ConfigError as error:
        raise ConfigError(f"adapter {name}: {error}") from None


def _document(path: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file, {} without the file."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(_text(path, name))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"adapter {name}: {path.name} cannot be read as JSON: {one_line(error, 100)}"
        ) from None
    return document if isinstance(document, dict) else {}


def _text(path: Path, name: str) -> str:
    limit = MOST_BYTES.get(path.name, MOST_BYTES[TEMPLATE_FILE])
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"adapter {name}: {path.name} has over {limit >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"adapter {name}: {path.name} cannot be read: {one_line(error, 100)}") from None
