"""One chat template in Jinja's sandbox, in a process of its own: it may take what that process may.

Gives templates what transformers gives them: its filters, functions and `{% generation %}` blocks. It keeps a
template from Python; what one takes is the kernel's to limit (host.py): no sandbox can end one call that
allocates or loops. Runs in copies of host.py only. Start at `Sandbox.render`.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

Turn = dict[str, Any]


class OutputLimitError(Exception):
    """The text of a conversation is longer than it may be."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what the model writes, whose place in the text is noted."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.environment.note_answer(text)  # type: ignore[attr-defined]  # Sandbox sets it
        return text


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names of Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **values):
            _public(name)
        jinja2.utils.Namespace.__init__(self, *rest, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class _Dict:
    """`dict(...)` without the class, which has more than templates may reach."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Sandbox:
    """One compiled template; raises what Jinja does for one that is none."""

    def __init__(self, template: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda written: datetime.now().strftime(written),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        environment.extend(note_answer=self._note)
        self._environment, self._source = environment, template
        self._template = environment.from_string(template)
        self._written = 0
        self._answers: list[tuple[int, int]] = []

    def names(self) -> dict[str, Any]:
        """Return the texts in it that may be names of roles, and whether it marks answers."""
        tree = self._environment.parse(self._source)
        texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        marks = any(_is_generation(block) for block in tree.find_all(jinja2.nodes.CallBlock))
        return {
            "words": sorted(text for text in texts if text.isidentifier()),
            "marks_answers": marks,
        }

    def render(
        self, turns: list[Turn], variables: Mapping[str, Any], *, most: int
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and (start, end) of its `{% generation %}` blocks; raises whatever templates do.

        OutputLimitError as soon as it is longer than `most` characters.
        """
        self._written, self._answers, pieces = 0, [], []
        for piece in self._template.generate(messages=turns, **variables):
            pieces.append(piece)
            self._written += len(piece)
            if self._written > most:
                raise OutputLimitError
        return "".join(pieces), self._answers

    def _note(self, text: str) -> None:
        self._answers.append((self._written, self._written + len(text)))


def _is_generation(block: jinja2.nodes.CallBlock) -> bool:
    called = block.call.node
    return isinstance(called, jinja2.nodes.ExtensionAttribute) and called.name == "_noted"


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' filter of this name does: Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
