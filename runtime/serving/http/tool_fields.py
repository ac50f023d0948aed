"""The fields of a request that say which functions the model may or must call, and what they mean.

OpenAI's `tools` and `tool_choice`, and their older form. Does not know routes, or how a call is written and
found in a text (serving/answer_parsers). Start at `ToolFields`, then `shown_tools` and `forced_call`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from runtime.errors import RequestError
from runtime.serving.answer_parsers.formats import CALLS
from runtime.serving.answer_parsers.forms import Tools
from runtime.serving.answer_parsers.grammars import ForcedCalls
from runtime.serving.http import fields
from runtime.serving.http.body_errors import SHOWN, required
from runtime.serving.http.body_types import Body, Flag, Name, Text, by_kind
from runtime.serving.lifecycle import ServedModel

MAX_TOOLS = 128


class FunctionTool(Body):
    """A function the model may call; `parameters` is a JSON schema."""

    treatments = fields.TOOL

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None
    """A call that is forced has a schema that is enforced in all its parts."""


class OtherTool(Body):
    """A tool as another route than chat completions has it, but for the name of its JSON schema."""

    type: Name
    name: Name | None = None
    description: Text | None = None
    strict: Flag | None = None
    """A call that is forced has a schema that is enforced in all its parts."""

    def as_tool(self, parameters: dict[str, Any] | None, at: str, *, served: str) -> "Tool":
        """Return the same tool of a chat completion; `served` is the one type that is.

        RequestError for one of another type, which its maker's own servers run, and for one without a name.
        """
        if self.type != served:
            raise RequestError(
                f"'{at}.type' is '{self.type[:SHOWN]}'; no tool is run here, send tools of type "
                f"'{served}' and run them yourself",
                param=f"{at}.type",
            )
        function = FunctionTool(
            name=required(self.name, f"{at}.name"),
            description=self.description,
            parameters=parameters,
            strict=self.strict,
        )
        return Tool(function=function)


class Tool(Body):
    """One tool of a request; only functions exist."""

    treatments = fields.TOOL

    type: Literal["function"] = "function"
    function: FunctionTool


class NamedFunction(Body):
    """A function by its name."""

    treatments = fields.TOOL

    name: Name


class ToolChoice(Body):
    """The one function that must be called."""

    treatments = fields.TOOL

    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(Body):
    """Some of the request's tools, of which the model may (auto) or must (required) call one."""

    treatments = fields.TOOL

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolChoice(Body):
    """The functions that may be called; the model is shown the others too."""

    treatments = fields.TOOL

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


TOOL_CHOICE = by_kind(
    "'auto', 'none', 'required' or an object that names a function or 'allowed_tools'",
    {str: "<word>", dict: "<function>"},
    {"allowed_tools": "<allowed>"},
)
ToolChoices = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<word>")]
    | Annotated[ToolChoice, Tag("<function>")]
    | Annotated[AllowedToolChoice, Tag("<allowed>")],
    TOOL_CHOICE,
]
FunctionChoices = Annotated[
    Annotated[Literal["auto", "none"], Tag("<word>")] | Annotated[NamedFunction, Tag("<function>")],
    by_kind("'auto', 'none' or an object that names a function", {str: "<word>", dict: "<function>"}),
]


class ToolFields(Body):
    """The functions that a model may call."""

    functions: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """The older form of `tools`."""
    function_call: FunctionChoices | None = None
    """The older form of `tool_choice`."""
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoices | None = None
    """Whether the model may or must call a function; an object names one that it must call, or those that
    it may (`allowed_tools`)."""

    @model_validator(mode="before")
    @classmethod
    def _functions_are_tools(cls, sent: Any) -> Any:
        """Return the body with the older form of tools in the newer one."""
        if type(sent) is not dict or not ("functions" in sent or "function_call" in sent):
            return sent
        functions, choice = sent.get("functions"), sent.get("function_call")
        if functions and sent.get("tools"):
            raise PydanticCustomError("exclusive", "has 'tools' and 'functions', which exclude each other")
        newer = dict(sent)
        if isinstance(functions, list):
            newer["tools"] = [{"function": function} for function in functions[:MAX_TOOLS]] or None
        if choice is not None:
            newer["tool_choice"] = {"function": choice} if isinstance(choice, dict) else choice
        return newer


def callable_tools(body: ToolFields) -> Tools:
    """Return the functions the model may call, with their schemas; none for `tool_choice` "none"."""
    choice = body.tool_choice
    if not body.tools or choice == "none":
        return {}
    found = {tool.function.name: tool.function.parameters or {} for tool in body.tools}
    if isinstance(choice, AllowedToolChoice):
        return {name: found[name] for name in _names(choice) if name in found}
    return found


def shown_tools(body: ToolFields, served: ServedModel, adapter: str | None) -> list[dict[str, Any]] | None:
    """Return the tools as templates print them, None where there are none: `strict` is said to the server.

    The template is that of `adapter`, where it has one.

    Raises RequestError where the model cannot be given tools, or its calls cannot be found.
    """
    if not callable_tools(body):
        return None
    if not served.tokenizer_for(adapter).features(with_tools=True).tools:
        raise RequestError("this model's chat template knows no tools", param="tools")
    parser = served.tool_call_parser
    if parser is not None and parser not in CALLS:
        raise RequestError(
            f"'tools' are not supported here: function calls in the form of '{parser}' are not known",
            param="tools",
        )
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()]


def forced_call(body: ToolFields, *, several: bool = False) -> ForcedCalls | None:
    """Return the calls that an answer must consist of: `tool_choice` "required", or a function.

    Raises RequestError where a function that it names is none of the request's.
    """
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return None
    older = body.function_call is not None
    param, among = ("function_call", "functions") if older else ("tool_choice", "tools")
    if not body.tools:
        raise RequestError(f"'{param}' asks for a call, and there are no '{among}'", param=param)
    tools = [tool.function for tool in body.tools]
    if not isinstance(choice, str):
        names = _names(choice)
        for name in names:
            if all(tool.name != name for tool in tools):
                raise RequestError(f"'{param}' names '{name}', which is not one of '{among}'", param=param)
        tools = [tool for tool in tools if tool.name in names]
    if isinstance(choice, AllowedToolChoice) and choice.allowed_tools.mode == "auto":
        return None
    schemas = {tool.name: tool.parameters or {} for tool in tools}
    strict = any(tool.strict for tool in tools)
    return ForcedCalls(schemas, param, strict=strict, several=several and not older)


def _names(choice: ToolChoice | AllowedToolChoice) -> list[str]:
    """Return the functions that a choice names."""
    if isinstance(choice, ToolChoice):
        return [choice.function.name]
    return [tool.function.name for tool in choice.allowed_tools.tools]
