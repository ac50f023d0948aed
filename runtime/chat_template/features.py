"""What one chat template renders, found by rendering with and without: never by its text.

One frozen record a template, made once (`probe`). What a request, a row or a format of answers needs to know
of a template is a field here. Does not know tokenizers, or what renders: that is a function it is given.
Start at `TemplateFeatures`, then `probe`.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from runtime.chat_template.thoughts import find_thought

Turn = dict[str, Any]
"""One message of a conversation as chat templates know it."""
Try = Callable[..., str | None]
"""`(turns, tools=, documents=, begins_answer=, **variables)` → the text, None where the template refuses."""

ToolPlace = Literal["", "tools", "system"]
"""Where a template looks for tools: nowhere, in a variable, in the system's message (`message.tools`)."""

_MARK = "8067142935"
"""Digits, which no template trims or writes in another case; followed by those of a kind of field."""
_SYSTEM, _ASKED, _SAID, _THOUGHT = _MARK + "01", _MARK + "02", _MARK + "03", _MARK + "04"
_RESULT, _TOOL, _SECOND, _DOCUMENT = _MARK + "05", "f" + _MARK + "06", "f" + _MARK + "07", _MARK + "08"
_STRANGER = "r" + _MARK
"""A role that no template knows."""

STANDS_FOR = {"developer": "system", "function": "tool"}
"""The role that a template is given which does not know the first."""
USUAL_ROLES = frozenset({"system", "user", "assistant", "tool"})
TOOL_VARIABLES = ("tools", "custom_tools", "functions", "available_tools")
"""Under which templates look for tools, the usual one first."""
PROBED_CALL = (_TOOL, {"a": _SAID})
"""Function and arguments of the call in `written_call`."""
THINKING = ("enable_thinking", "thinking")
"""Variables with which templates have the model think, or not."""
EFFORT = "reasoning_effort"
RESULT_ROLES = ("tool", "ipython", "function", "observation", "tool_response")
MOST_ROLES = 256
"""Words of a template that are tried as roles."""
NINE = re.compile(r"[A-Za-z0-9]{9}")
"""The only ids that Mistral's templates take."""


@dataclass(frozen=True, slots=True)
class TemplateFeatures:
    """What one chat template renders; of no template, as for one that renders nothing."""

    system: bool = False
    """A system's message before the question."""
    later_system: bool = False
    """A system's message in the middle of a conversation."""
    developer: bool = False
    """The role developer, otherwise than any role at all; where it is False the system stands for it."""
    roles: frozenset[str] = USUAL_ROLES
    """The roles that are rendered otherwise than one that nobody knows, and the usual ones."""
    tools: ToolPlace = ""
    tool_variable: str = "tools"
    """The variable in which tools are given, where `tools` is "tools"."""
    documents: bool = False
    thinking: str = ""
    """The variable that turns thinking on and off: enable_thinking or thinking; "" where there is none."""
    thinks: bool = True
    """Whether the prompt without that variable is the one of thinking on, where there is such a variable."""
    effort: bool = False
    """Whether `reasoning_effort` changes the prompt."""
    opens_thought: str = ""
    """The opening of a thought that the generation prompt ends with by default, such as <think>."""
    opens_thought_on: str = ""
    """The same with thinking turned on."""
    keeps_thoughts: bool = False
    """Whether the thought of an answer is shown after a further question."""
    keeps_thoughts_of_calls: bool = False
    """Whether the thought before a call is shown with the call's result."""
    alternates: bool = False
    """Whether two questions in a row are refused."""
    calls: bool = False
    """Tool calls of earlier turns."""
    parallel_calls: bool = False
    """All of several calls in one turn."""
    written_call: str = ""
    """An answer that is `PROBED_CALL`, as the template writes it after the question."""
    written_thought: str = ""
    """An answer with a thought in a field of its own, as the template writes it after the question."""
    text_arguments: bool = False
    """Arguments of calls are given as JSON text, not as an object."""
    results: bool = False
    """Results of tools, in the role `result_role`."""
    parallel_results: bool = False
    result_role: str = "tool"
    call_ids: Literal["any", "nine"] = "any"
    """Ids of calls that are taken: any, or nine letters and digits."""
    marks_answers: bool = False
    """It has `{% generation %}` blocks: it says itself what the model writes."""

    def role(self, sent: str) -> str:
        """Return `sent`, or the role that stands for it where the template does not know it."""
        return sent if sent in self.roles else STANDS_FOR.get(sent, sent)


def opened_thought(prompt: str) -> str:
    """Return the opening of the thought that `prompt` ends with, "" where it ends otherwise."""
    found = find_thought(prompt)
    return found.opening if found is not None and found.is_left_open("") else ""


def probe(attempt: Try, *, words: Iterable[str] = (), marks_answers: bool = False) -> TemplateFeatures:
    """Return what a template renders, by some fifty renderings of short conversations.

    `words` are the texts in the template that may be roles.
    """
    return _Probe(attempt, frozenset(words)).features(marks_answers)


class _Probe:
    """The conversations that a template is tried with."""

    def __init__(self, attempt: Try, words: frozenset[str]) -> None:
        self._try, self._words = attempt, words
        self._text_arguments = self._takes_text_arguments()

    def features(self, marks_answers: bool) -> TemplateFeatures:
        asked = _message("user", _ASKED)
        roles = self._roles()
        place, variable = self._tools()
        result_role = self._result_role()
        switch, thinks, opens_on = self._thinking()
        later = [asked, _message("assistant", _SAID)]
        return TemplateFeatures(
            system=self._shows([_message("system", _SYSTEM), asked], _SYSTEM),
            later_system=self._shows([*later, _message("system", _SYSTEM), asked], _SYSTEM),
            developer="developer" in roles,
            roles=roles | USUAL_ROLES,
            tools=place,
            tool_variable=variable,
            documents=self._reads_documents(),
            thinking=switch,
            thinks=thinks,
            effort=self._changes(EFFORT, "low", "high"),
            opens_thought=opened_thought(self._try([asked]) or ""),
            opens_thought_on=opens_on,
            keeps_thoughts=self._shows([asked, _answer(), asked], _THOUGHT),
            keeps_thoughts_of_calls=self._shows(self._called(1, result_role, thought=_THOUGHT), _THOUGHT),
            alternates=self._try([asked, asked]) is None and self._try([*later, asked]) is not None,
            calls=self._shows(self._called(1, result_role), _TOOL),
            parallel_calls=self._shows(self._called(2, result_role), _TOOL, _SECOND),
            written_call=self._written(self._called(1, "tool")[1]),
            written_thought=self._written(_answer()),
            text_arguments=self._text_arguments,
            results=self._shows(self._called(1, result_role), _RESULT),
            parallel_results=self._shows(self._called(2, result_role), _RESULT + "0", _RESULT + "1"),
            result_role=result_role,
            call_ids=self._call_ids(),
            marks_answers=marks_answers,
        )

    def _shows(self, turns: list[Turn], *marks: str, **options: Any) -> bool:
        text = self._try(turns, **options)
        return text is not None and all(mark in text for mark in marks)

    def _written(self, answer: Turn) -> str:
        """Return what the template writes of an answer, its end included."""
        asked = _message("user", _ASKED)
        whole = self._try([asked, answer], begins_answer=False) or ""
        prompt = self._try([asked]) or ""
        pairs = zip(whole, prompt, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(whole), len(prompt)))
        for opening, closing in ("<>", "[]"):  # of a tag that begins as the prompt's does
            start = whole.rfind(opening, 0, at)
            at = start if start >= 0 and closing not in whole[start:at] else at
        return whole[at:]

    def _changes(self, variable: str, *values: Any) -> bool:
        """Return whether the prompt depends on a variable: without it, or with one of `values`."""
        turns = [_message("user", _ASKED)]
        texts = {self._try(turns, **{variable: value}) for value in values} - {None}
        return len(texts | {self._try(turns)} - {None}) > 1

    def _roles(self) -> frozenset[str]:
        words = sorted(self._words | {"developer"}, key=lambda word: (word != "developer", word))
        return frozenset(word for word in words[:MOST_ROLES] if self._knows(word))

    def _knows(self, role: str) -> bool:
        """Return whether the template shows a message of `role`, otherwise than one of a stranger's."""
        asked = _message("user", _ASKED)
        before: list[list[Turn]] = [[], [asked], [asked, _message("assistant", _SAID)]]
        for turns in before:
            shown = self._try([*turns, _message(role, _SYSTEM), asked])
            if shown is None or _SYSTEM not in shown:
                continue
            stranger = self._try([*turns, _message(_STRANGER, _SYSTEM), asked])
            return stranger is None or stranger.replace(_STRANGER, role) != shown
        return False

    def _tools(self) -> tuple[ToolPlace, str]:
        asked = _message("user", _ASKED)
        for variable in TOOL_VARIABLES:
            if self._shows([asked], _TOOL, **{variable: [_tool(_TOOL)]}):
                return "tools", variable
        told = system_with_tools([asked], [_tool(_TOOL)])
        return ("system" if self._shows(told, _TOOL) else ""), "tools"

    def _reads_documents(self) -> bool:
        document = {"title": _DOCUMENT, "text": _DOCUMENT, "content": _DOCUMENT, "doc_id": 1}
        return self._shows([_message("user", _ASKED)], _DOCUMENT, documents=[document])

    def _thinking(self) -> tuple[str, bool, str]:
        """Return the switch, whether thinking is on without it, and the thought that is opened with it on."""
        turns = [_message("user", _ASKED)]
        for name in THINKING:
            if self._changes(name, True, False):
                on, off = (self._try(turns, **{name: value}) for value in (True, False))
                default = self._try(turns)
                return name, on is not None and (default == on or default != off), opened_thought(on or "")
        return "", True, opened_thought(self._try(turns) or "")

    def _result_role(self) -> str:
        shown = (role for role in RESULT_ROLES if self._shows(self._called(1, role), _RESULT))
        return next(shown, "tool")

    def _call_ids(self) -> Literal["any", "nine"]:
        if self._try(self._called(1, "tool", ids="call_0123456789")) is not None:
            return "any"
        return "nine" if self._try(self._called(1, "tool")) is not None else "any"

    def _called(
        self, count: int, result_role: str, *, ids: str = "a1b2c3d4", thought: str = ""
    ) -> list[Turn]:
        """Return a conversation with `count` calls in one turn, and their results."""
        named = [(f"{ids}{index}", name) for index, name in enumerate((_TOOL, _SECOND)[:count])]
        arguments: Any = {"a": _SAID}
        arguments = json.dumps(arguments) if self._text_arguments else arguments
        calls = [call(each, name, arguments) for each, name in named]
        answer: Turn = {"role": "assistant", "content": "", "tool_calls": calls}
        if thought:
            answer["reasoning_content"] = thought
        results = [
            {"role": result_role, "content": f"{_RESULT}{index}", "tool_call_id": each, "name": name}
            for index, (each, name) in enumerate(named)
        ]
        return [_message("user", _ASKED), answer, *results]

    def _takes_text_arguments(self) -> bool:
        """Return whether a template writes the arguments of a call as they are: they must be JSON text.

        Given an object, such a template fails or writes it as Python does, in single quotes.
        """
        key = "k" + _MARK
        shown = self._call_text({key: "v"})
        if shown is not None and (key not in shown or f"'{key}'" not in shown):
            return False
        text = json.dumps({key: "v"})
        return text in (self._call_text(text) or "")

    def _call_text(self, arguments: Any) -> str | None:
        answer = {"role": "assistant", "content": "", "tool_calls": [call("a1b2c3d4e", "f", arguments)]}
        return self._try([_message("user", "q"), answer], begins_answer=False)


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """Return a tool call as templates know it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def system_with_tools(turns: list[Turn], tools: list[dict[str, Any]]) -> list[Turn]:
    """Return a conversation whose system's message has the tools, as Phi-4-mini's templates want them.

    That is JSON text of the functions, under `tools`; a message without content is added where there is none.
    """
    functions = [tool.get("function", tool) for tool in tools]
    told = {"tools": json.dumps(functions, ensure_ascii=False)}
    if turns and turns[0].get("role") == "system":
        return [{**turns[0], **told}, *turns[1:]]
    return [{"role": "system", "content": "", **told}, *turns]


def _message(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _answer() -> Turn:
    return {**_message("assistant", _SAID), "reasoning_content": _THOUGHT}


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "text"}}}
    function = {"name": name, "description": "function", "parameters": {**parameters, "required": ["a"]}}
    return {"type": "function", "function": function}
