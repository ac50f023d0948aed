"""Grammars of answers that must be a call, or have a form, in the spelling of their model.

A reasoning model thinks first: what is asked for binds what follows the thought. The result is a grammar in
Lark's notation without the rules `part0` and so on, each of which is a constraint of its own
(structured_output/forms.py). Does not know llguidance or requests. Start at `spelled`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import RequestError
from runtime.serving.answer_parsers import harmony
from runtime.serving.answer_parsers.argument_schemas import MOST_OPTIONS, ArgumentSchemas
from runtime.serving.answer_parsers.forms import AnswerForm, CallSpelling, Schema, Tools
from runtime.serving.engine.protocol import Constraint

NOTHING = '""'
ANY = r"/(?s:.*)/"
SPACE = r"/\s{0,4}/"


@dataclass(frozen=True, slots=True)
class ForcedCalls:
    """The calls that an answer must consist of."""

    tools: Tools
    param: str
    strict: bool = False
    several: bool = False
    """Further calls may follow the first."""


def spelled(
    form: AnswerForm,
    asked: Constraint | None,
    forced: ForcedCalls | None,
    *,
    prompt: str,
    special: Mapping[str, int],
) -> Constraint | None:
    """Return what an answer in `form` must match: calls, or what is asked for, behind the thought if any.

    Args:
        prompt: the end of the prompt's text, special tokens as their names: it may have opened a thought.
        special: the special tokens, with their ids.
    """
    wanted = forced or asked
    if wanted is None or (forced is None and not (form.thoughts or form.harmony)):
        return asked
    lark = _Lark(special, wanted.param)
    if forced is not None:
        body = lark.calls(forced, form)
    elif asked is not None:
        body = lark.part(asked.kind, asked.value, asked.whitespace)
        body = f"{lark.text(_FINAL)} {body}" if form.harmony else body
    before = lark.channels(prompt) if form.harmony else lark.thought(form, prompt)
    lark.rules["start"] = f"{before} {body}"
    top = "\n".join(f"{name}: {rule}" for name, rule in lark.rules.items())
    return Constraint("answer", {"top": top, "parts": lark.parts}, wanted.param, wanted.strict)


_ANALYSIS = (f"{harmony.CHANNEL}analysis{harmony.MESSAGE}", f"{harmony.END}{harmony.START}assistant")
_FINAL = f"{harmony.CHANNEL}final{harmony.MESSAGE}"
_HARMONY = CallSpelling(
    f"{harmony.CHANNEL}commentary to=functions.{{name}} {harmony.CONSTRAIN}json{harmony.MESSAGE}{{arguments}}"
)


@dataclass(slots=True)
class _Lark:
    """A grammar in the making."""

    special: Mapping[str, int]
    param: str
    """The field of the request that asks for the form."""
    rules: dict[str, str] = field(default_factory=lambda: {"start": ""})
    parts: list[dict[str, Any]] = field(default_factory=list)
    _choices: dict[int, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Lists by their identity, with the names of their rules."""
    _options_left: int = MOST_OPTIONS
    _starts: frozenset[str] = frozenset()
    """The first characters of special tokens: most texts have none of them."""

    def __post_init__(self) -> None:
        self._starts = frozenset(name[0] for name in self.special if name)

    def text(self, text: str) -> str:
        """Return a text as Lark writes it, the special tokens in it as tokens."""
        names: list[str] = []
        if not self._starts.isdisjoint(text):
            names = sorted((name for name in self.special if name in text), key=len, reverse=True)
        if not names:
            return json.dumps(text, ensure_ascii=False) if text else ""
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        written = (
            f"<[{self.special[each]}]>" if each in self.special else json.dumps(each, ensure_ascii=False)
            for each in pieces
            if each
        )
        return " ".join(written)

    def rule(self, body: str, options: str = "") -> str:
        """Return the name of a new rule."""
        name = f"r{len(self.rules)}"
        self.rules[f"{name}{options}"] = body
        return name

    def choice(self, texts: tuple[str, ...]) -> str:
        """Return a rule for one of `texts`; a list that several arguments have becomes one rule."""
        if len(texts) == 1:
            return self.text(texts[0])
        if id(texts) not in self._choices:
            self._choices[id(texts)] = texts, self.rule(" | ".join(map(self.text, texts)))
        return self._choices[id(texts)][1]

    def until(self, end: str) -> str:
        """Return a rule for any text and `end` behind it."""
        if end in self.special:
            return f"{self.rule(ANY)} {self.text(end)}"
        return self.rule(ANY, f"[suffix={json.dumps(end, ensure_ascii=False)}]")

    def part(self, kind: str, value: Any, whitespace: str | None = None) -> str:
        """Return the name of a rule that is a constraint of its own."""
        self.parts.append({"kind": kind, "value": value, "whitespace": whitespace})
        return f"part{len(self.parts) - 1}"

    def thought(self, form: AnswerForm, prompt: str) -> str:
        """Return the rule of what comes before the answer of a model that thinks, "" for others."""
        if form.thoughts is None or prompt.rstrip().endswith(form.thoughts.ends):
            return ""
        ends = [self.until(end) for end in form.thoughts.ends]
        rest = f"({' | '.join(ends)}) {self.rule(SPACE)}"
        if prompt.rstrip().endswith(form.thoughts.starts) or form.thoughts.implied:
            return rest
        starts = " | ".join(self.text(start) for start in form.thoughts.starts)
        return f"(({starts}) {rest})?"

    def channels(self, prompt: str) -> str:
        """Return the rule of harmony's analysis before the message that counts."""
        begin, end = _ANALYSIS
        messages = f"({self.text(begin)} {self.rule(ANY)} {self.text(end)})*"
        return "" if harmony.MESSAGE in prompt.rpartition(harmony.START)[2] else messages

    def calls(self, forced: ForcedCalls, form: AnswerForm) -> str:
        """Return the rule of calls in the spelling of `form`."""
        spelling = _HARMONY if form.harmony or form.calls is None else form.calls.spelling
        if spelling.token and spelling.token not in self.special and spelling.without is not None:
            spelling = spelling.without
        each = " | ".join(self.call(spelling, name, schema) for name, schema in forced.tools.items())
        call = self.rule(each)
        more = f"({self.text(spelling.between)} {call})*" if forced.several and not form.harmony else ""
        return f"{self.text(spelling.before)} {call} {more} {self.text(spelling.after)}"

    def call(self, spelling: CallSpelling, name: str, schema: Schema) -> str:
        """Return the rule of one call of one function."""
        before, _, after = spelling.call.partition("{arguments}")
        begin, end = (part.replace("{name}", name) for part in (before, after))
        if not spelling.argument:
            arguments = self.part("schema", schema or {"type": "object"})
        else:
            arguments = self.arguments(spelling, schema, self.required(name, schema))
        return f"{self.text(begin)} {arguments} {self.text(end)}"

    def required(self, name: str, schema: Schema) -> frozenset[str]:
        """Return the arguments that a function requires; RequestError for what is no list of names."""
        required = schema.get("required") or []
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise RequestError(
                f"'{self.param}': 'required' of '{name}' is not a list of names; send one, or leave it out",
                param=self.param,
            )
        return frozenset(required)

    def arguments(self, spelling: CallSpelling, schema: Schema, required: frozenset[str]) -> str:
        """Return the rule of arguments that are written one by one: those that are required, and others."""
        properties = schema.get("properties")
        found = list(properties.items()) if isinstance(properties, Mapping) else []
        found.sort(key=lambda item: item[0] not in required)
        shared = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
        schemas = ArgumentSchemas(shared, most=self._options_left)
        values = [self._argument(spelling, name, value, schemas, shared) for name, value in found]
        self._options_left = schemas.left
        if schemas.left <= 0:
            raise RequestError(
                f"'{self.param}': the functions' arguments are made of more than {MOST_OPTIONS} schemas, "
                "one that several refer to counted for each",
                param=self.param,
            )
        after = {True: NOTHING, False: NOTHING}  # by whether no argument comes before
        for (name, _), value in reversed(list(zip(found, values, strict=True))):
            here = {}
            for first in (True, False):
                between = "" if first else self.text(spelling.separator)
                rest = f"{between} {value} {after[False]}"
                here[first] = self.rule(rest if name in required else f"({rest}) | ({after[first]})")
            after = here
        return after[True]

    def _argument(
        self,
        spelling: CallSpelling,
        name: str,
        schema: Any,
        schemas: ArgumentSchemas,
        shared: Mapping[str, Any],
    ) -> str:
        before, _, after = spelling.argument.replace("{key}", name).partition("{value}")
        value = schema if isinstance(schema, Mapping) else {}
        expected = schemas.kinds(value)
        may_be_text = not expected or "string" in expected  # and is read as JSON where it is of another type
        if spelling.plain_text and (expected == {"string"} or (may_be_text and not spelling.quote)):
            before, after = before + spelling.quote, spelling.quote + after
            if lists := schemas.choices(value):
                lists += [("null",)] if "null" in expected else []
                return f"{self.text(before)} ({' | '.join(map(self.choice, lists))}) {self.text(after)}"
            return f"{self.text(before)} {self.until(after)}"
        reference = self.part("schema", {**value, **shared} if value else True)
        return f"{self.text(before)} {reference} {self.text(after)}"
