"""The body of OpenAI's POST /v1/responses, and the same request as a chat completion.

Items of the input, instructions, tools and formats become messages and fields of a chat completion, so that
one path renders, limits and generates for both routes. Does not know what answers look like (responses.py).
Start at `ResponsesBody`, then `as_chat`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from runtime.errors import RequestError
from runtime.serving.http import fields
from runtime.serving.http.body_errors import SHOWN, required
from runtime.serving.http.body_types import Body, Flag, Integer, Metadata, Name, Text, TokenCount, by_kind
from runtime.serving.http.constraint_fields import JsonSchema, ResponseFormat, exclusive
from runtime.serving.http.messages import (
    MOST_MESSAGES,
    Content,
    FunctionCall,
    Message,
    Said,
    ToolCall,
    check_calls,
    content_of,
    with_contents,
)
from runtime.serving.http.schema import MAX_LOGPROBS, ChatCompletionBody, SamplingFields, Wording
from runtime.serving.http.tool_fields import (
    MAX_TOOLS,
    TOOL_CHOICE,
    AllowedToolChoice,
    AllowedTools,
    NamedFunction,
    OtherTool,
    ToolChoice,
    ToolChoices,
)

TEXT_FORMAT = "text.format"
LOGPROBS = "message.output_text.logprobs"


class Item(Message):
    """One item of `input`: a message, a thought of the model, a call of a function, or its output."""

    treatments = fields.ITEM

    type: Name = "message"
    role: Name = ""
    call_id: Name | None = None
    """Of a call and its output."""
    arguments: Text | None = None
    """Of a call: the text of a JSON object."""
    output: Content | None = None
    """What a call returned."""
    summary: Said = None
    """Of a thought, where it has no content."""


class ResponseTool(OtherTool):
    """A function that the model may call; `parameters` is a JSON schema."""

    treatments = fields.TOOL

    type: Name = "function"
    """Only `function`: no tool is run here."""
    parameters: dict[str, Any] | None = None


class ResponseToolChoice(NamedFunction):
    """The one function that must be called."""

    type: Literal["function"] = "function"

    def as_chat(self) -> ToolChoice:
        """Return the same choice of a chat completion."""
        return ToolChoice(function=NamedFunction(name=self.name))


class ResponseAllowedTools(Body):
    """The functions that may (mode auto) or must (required) be called; the model is shown the others too."""

    treatments = fields.TOOL

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]

    def as_chat(self) -> AllowedToolChoice:
        """Return the same choice of a chat completion."""
        allowed = AllowedTools(mode=self.mode, tools=[tool.as_chat() for tool in self.tools])
        return AllowedToolChoice(type=self.type, allowed_tools=allowed)


class Reasoning(Body):
    """How the model thinks."""

    treatments = fields.REASONING

    effort: Name | None = None
    """The variable `reasoning_effort` of the model's chat template, where that reads it."""


class Format(Body):
    """What the answer must be: text, json_object, or json_schema with its schema."""

    treatments = fields.FORM

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "answer"
    description: Text | None = None
    """Ignored."""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag = False
    """Refuse a schema that cannot be enforced in all its parts."""


class TextFormat(Body):
    """How the answer's text is constrained."""

    treatments = fields.FORM

    format: Format = Format()


Inputs = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Item],
        Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
        BeforeValidator(with_contents),
        Tag("<items>"),
    ],
    by_kind("a string or a list of items", {str: "<text>", list: "<items>"}),
]
ResponseToolChoices = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<word>")]
    | Annotated[ResponseToolChoice, Tag("<function>")]
    | Annotated[ResponseAllowedTools, Tag("<allowed>")],
    TOOL_CHOICE,
]


class ResponsesBody(SamplingFields):
    """POST /v1/responses."""

    treatments = fields.RESPONSES

    input: Inputs
    model: Name | None = None
    instructions: Text | None = None
    """A system turn before the input."""
    max_output_tokens: TokenCount | None = None
    stream: Flag = False
    text: TextFormat | None = None
    """What the answer must be: text, json_object or json_schema."""
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ResponseToolChoices | None = None
    """Whether the model may or must call a function; an object names one that it must call, or those that
    it may (`allowed_tools`)."""
    parallel_tool_calls: Flag = True
    """Whether one answer may hold several calls; false: the first of them."""
    reasoning: Reasoning | None = None
    include: Annotated[list[Name], Field(max_length=16, fail_fast=True)] | None = None
    """`message.output_text.logprobs` reports log probabilities; of nothing else there is more to include."""
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Alternatives reported per token, with that."""
    metadata: Metadata | None = None
    """Sent back with the answer."""

    @property
    def logprobs(self) -> bool:
        """Whether log probabilities are reported."""
        return self.include is not None and LOGPROBS in self.include

    def as_chat(self) -> tuple[ChatCompletionBody, Wording]:
        """Return the same request as a chat completion, and what its parts are called here.

        Raises RequestError for an item or a tool that is not served here.
        """
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"'top_logprobs' needs '{LOGPROBS}' in 'include'", param="top_logprobs")
        placed = list(self._messages())
        sampling = self.chosen()
        required_format = self._format()
        if required_format is not None:
            if self.response_format is not None:
                raise exclusive(TEXT_FORMAT, "response_format")
            sampling["response_format"] = required_format
        if "parallel_tool_calls" in self.model_fields_set:
            sampling["parallel_tool_calls"] = self.parallel_tool_calls
        chat = ChatCompletionBody.model_construct(
            messages=[message for _, message in placed],
            model=self.model,
            max_tokens=self.max_output_tokens,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            tools=[
                tool.as_tool(tool.parameters, f"tools[{index}]", served="function")
                for index, tool in enumerate(self.tools or ())
            ]
            or None,
            tool_choice=self._tool_choice(),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            **sampling,
        )
        format_param = TEXT_FORMAT if required_format is not None else "response_format"
        places = [place for place, _ in placed]
        return chat, Wording("input", places, length="max_output_tokens", format=format_param)

    def _tool_choice(self) -> ToolChoices | None:
        """Return which function may be called as chat completions say it."""
        choice = self.tool_choice
        return choice if choice is None or isinstance(choice, str) else choice.as_chat()

    def _format(self) -> ResponseFormat | None:
        """Return what the answer must be as chat completions say it, None for a text."""
        if self.text is None or self.text.format.type == "text":
            return None
        wanted = self.text.format
        schema = JsonSchema(schema_=wanted.schema_, strict=wanted.strict)
        return ResponseFormat(type=wanted.type, json_schema=schema if wanted.type == "json_schema" else None)

    def _messages(self) -> Iterator[tuple[int, Message]]:
        if self.instructions:
            yield 0, Message(role="system", content=self.instructions)
        if isinstance(self.input, str):
            yield 0, Message(role="user", content=self.input)
            return
        answer = _Answer()
        for index, item in enumerate(self.input):
            if not answer.takes(item):
                yield from answer.message()
                answer = _Answer(index)
            if (message := answer.add(item, f"input[{index}]")) is not None:
                yield index, message
        yield from answer.message()


@dataclass(slots=True)
class _Answer:
    """Items that one answer of the model has been: a thought, a text and calls, which are one turn."""

    index: int = 0
    thoughts: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def takes(self, item: Item) -> bool:
        """Whether `item` belongs to the same answer as those before."""
        if item.type == "function_call":
            return True
        begun = self.text is not None or bool(self.calls)
        if item.type == "reasoning":
            return not begun
        return item.type == "message" and _is_plain_answer(item) and not begun

    def add(self, item: Item, at: str) -> Message | None:
        """Take an item in; return it where it is a message of its own instead."""
        match item.type:
            case "reasoning":
                said = "".join(content_of(item, "assistant", f"{at}.content"))
                self.thoughts.append(said or item.summary or "")
            case "function_call":
                function = FunctionCall(
                    name=required(item.name, f"{at}.name"),
                    arguments=required(item.arguments, f"{at}.arguments"),
                )
                self.calls.append(ToolCall(id=required(item.call_id, f"{at}.call_id"), function=function))
            case "function_call_output":
                output = required(item.output, f"{at}.output")
                call_id = required(item.call_id, f"{at}.call_id")
                return Message.model_construct(role="tool", tool_call_id=call_id, content=output)
            case "message" if _is_plain_answer(item):
                self.text, thought = content_of(item, "assistant", f"{at}.content")
                self.thoughts.append(thought)
            case "message":
                if not item.role:
                    raise RequestError(f"'{at}.role' is missing", param=f"{at}.role")
                return item
            case kind:
                raise RequestError(
                    f"'{at}.type' is '{kind[:SHOWN]}', which is not served here; send items of type "
                    "message, reasoning, function_call and function_call_output",
                    param=at,
                )
        return None

    def message(self) -> Iterator[tuple[int, Message]]:
        """Yield the turn of the assistant that the items are, if there were any."""
        check_calls(self.calls, f"input[{self.index}]")
        thought = "".join(self.thoughts)
        if thought or self.calls or self.text is not None:
            yield (
                self.index,
                Message(
                    role="assistant",
                    content=self.text or "",
                    tool_calls=self.calls or None,
                    reasoning_content=thought or None,
                ),
            )


def _is_plain_answer(item: Item) -> bool:
    """Whether a message is the text of an answer; calls within it are read as chat completions' are."""
    return item.role == "assistant" and not item.tool_calls and item.function_call is None
