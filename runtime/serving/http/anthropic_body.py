"""The body of Anthropic's POST /v1/messages, and the same request as a chat completion.

The system's text, blocks of content, tools, thinking and formats become OpenAI's messages and fields, so
that one path renders, limits and generates for both routes. Does not know what answers look like
(anthropic.py). Start at `MessagesBody`, then `as_chat`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from runtime.chat_template.features import THINKING
from runtime.errors import RequestError
from runtime.serving.http import fields
from runtime.serving.http.body_errors import SHOWN, required
from runtime.serving.http.body_types import Body, Flag, Name, ShortText, Text, TokenCount, by_kind
from runtime.serving.http.constraint_fields import JsonSchema, ResponseFormat, exclusive
from runtime.serving.http.messages import (
    MOST_MESSAGES,
    MOST_PARTS,
    FunctionCall,
    Message,
    ToolCall,
    check_calls,
)
from runtime.serving.http.schema import MAX_STOPS, ChatCompletionBody, SamplingFields, Wording
from runtime.serving.http.tool_fields import MAX_TOOLS, NamedFunction, OtherTool, ToolChoice, ToolChoices


class TextBlock(Body):
    """A block of text."""

    treatments = fields.BLOCK

    type: Literal["text"] = "text"
    text: Text


def _content(block: type[Body]) -> Any:
    """Return the type of content that is a text or a list of blocks."""
    return Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[block], Field(max_length=MOST_PARTS, fail_fast=True), Tag("<blocks>")],  # type: ignore[valid-type]
        by_kind("a string or a list of blocks", {str: "<text>", list: "<blocks>"}),
    ]


class ResultBlock(Body):
    """A block of what a tool returned: text."""

    treatments = fields.BLOCK

    type: Name = "text"
    text: Text | None = None


class Block(Body):
    """One block of a message: text, thinking, the use of a tool, or its result."""

    treatments = fields.BLOCK

    type: Name = "text"
    text: Text | None = None
    thinking: Text | None = None
    id: Name | None = None
    name: Name | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Name | None = None
    content: _content(ResultBlock) | None = None  # type: ignore[valid-type]


class AnthropicMessage(Body):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: _content(Block)  # type: ignore[valid-type]


class AnthropicTool(OtherTool):
    """A function that the model may call."""

    treatments = fields.ANTHROPIC_TOOL

    type: Name = "custom"
    """Only `custom`: no tool is run here."""
    input_schema: dict[str, Any] | None = None


class AnthropicToolChoice(Body):
    """Whether the model may or must call a tool, and how many."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    """The tool that must be called, with type `tool`."""
    disable_parallel_tool_use: Flag = False
    """At most one call."""


class Thinking(Body):
    """Whether the model thinks before it answers, where its template has a switch for that."""

    treatments = fields.THINKING

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None
    """`omitted` leaves the text of thoughts out of the answer."""


class OutputFormat(Body):
    """What the answer must be."""

    type: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """The answer's form, and how hard the model thinks."""

    effort: Name | None = None
    """The variable `reasoning_effort` of the model's chat template, where that reads it."""
    format: OutputFormat | None = None


class MessagesBody(SamplingFields):
    """POST /v1/messages, and /v1/messages/count_tokens, for which what the prompt is made of matters."""

    treatments = fields.ANTHROPIC

    model: Name | None = None
    """The base model or an adapter; None is the base model."""
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    system: _content(TextBlock) | None = None  # type: ignore[valid-type]
    """A turn of the system before the conversation."""
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The earlier place of `output_config.format`."""
    max_tokens: TokenCount | None = None
    """Longest answer, in tokens."""
    stop_sequences: Annotated[list[ShortText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    """Strings that end the answer; they are not part of it."""
    stream: Flag = False

    @property
    def shows_thoughts(self) -> bool:
        """Whether the answer has blocks of thinking with their text."""
        thinking = self.thinking
        return thinking is None or (thinking.type != "disabled" and thinking.display != "omitted")

    def as_chat(self) -> tuple[ChatCompletionBody, Wording]:
        """Return the same request as OpenAI's, and what its parts are called here.

        Raises RequestError for a block, a tool or a choice of tools that is not served here.
        """
        messages = list(self._turns())
        asked = self.chosen()
        format_param, asked["response_format"] = self._format()
        if self.stop and self.stop_sequences:
            raise RequestError("'stop' and 'stop_sequences' exclude each other", param="stop")
        asked |= {"stop": self.stop_sequences} if self.stop_sequences else {}
        if self.tool_choice is not None and "disable_parallel_tool_use" in self.tool_choice.model_fields_set:
            asked["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        chat = ChatCompletionBody.model_construct(
            messages=messages,
            model=self.model,
            max_tokens=self.max_tokens,
            stream=self.stream,
            tools=[
                tool.as_tool(tool.input_schema, f"tools[{index}]", served="custom")
                for index, tool in enumerate(self.tools or ())
            ]
            or None,
            tool_choice=self._tool_choice(),
            continue_final_message=_is_text_of_assistant(messages[-1]),
            chat_template_kwargs=self._template_variables(),
            reasoning_effort=self.output_config.effort if self.output_config else None,
            **asked,
        )
        return chat, Wording(format=format_param)

    def _turns(self) -> Iterator[Message]:
        if self.system:
            yield Message(role="system", content=_joined(self.system))
        for index, message in enumerate(self.messages):
            yield from _turns(message, f"messages[{index}]")

    def _tool_choice(self) -> "ToolChoices | None":
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            return ToolChoice(function=NamedFunction(name=required(choice.name, "tool_choice.name")))
        words: dict[str, Literal["auto", "none", "required"]] = {
            "auto": "auto",
            "any": "required",
            "none": "none",
        }
        return words[choice.type]

    def _template_variables(self) -> dict[str, Any] | None:
        """Return the variables that turn thinking on or off, where that is wanted; templates read one."""
        if self.thinking is None or self.thinking.type not in {"enabled", "disabled"}:
            return None
        return dict.fromkeys(THINKING, self.thinking.type == "enabled")

    def _format(self) -> tuple[str, ResponseFormat | None]:
        """Return the one field that says what the answer must be, and what that is; None for a text."""
        own = [
            ("output_config.format", self.output_config.format if self.output_config else None),
            ("output_format", self.output_format),
        ]
        given = [(param, _as_response_format(wanted)) for param, wanted in own if wanted is not None]
        if self.response_format is not None:
            given.append(("response_format", self.response_format))
        if len(given) > 1:
            raise exclusive(given[0][0], given[1][0])
        return given[0] if given else ("response_format", None)


def _as_response_format(wanted: OutputFormat) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema_=wanted.schema_))


def _turns(message: AnthropicMessage, at: str) -> Iterator[Message]:
    """Yield a message as OpenAI's: results of tools, which answer the calls before, and then the rest."""
    if isinstance(message.content, str):
        yield Message(role=message.role, content=message.content)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(message.content):
        place = f"{at}.content[{index}]"
        match block.type, message.role:
            case "text", _:
                texts.append(required(block.text, f"{place}.text"))
            case "thinking", "assistant":
                thoughts.append(required(block.thinking, f"{place}.thinking"))
            case "redacted_thinking", "assistant":
                pass  # nobody but its author can read it
            case "tool_use", "assistant":
                function = FunctionCall(
                    name=required(block.name, f"{place}.name"),
                    arguments=required(block.input, f"{place}.input"),
                )
                calls.append(ToolCall(id=required(block.id, f"{place}.id"), function=function))
            case "tool_result", "user":
                call_id = required(block.tool_use_id, f"{place}.tool_use_id")
                yield Message(role="tool", tool_call_id=call_id, content=_result(block, place))
            case kind, role:
                raise RequestError(
                    f"'{place}.type' is '{kind[:SHOWN]}', which is not served here in a message of the "
                    f"{role}; send text, thinking, tool_use and tool_result blocks",
                    param=f"{place}.type",
                )
    check_calls(calls, at)
    if texts or thoughts or calls or not any(block.type == "tool_result" for block in message.content):
        thought = "".join(thoughts) or None
        yield Message(
            role=message.role, content="".join(texts), tool_calls=calls or None, reasoning_content=thought
        )


def _result(block: Block, place: str) -> str:
    """Return what a tool returned as text."""
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    for index, part in enumerate(block.content):
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"'{place}.content[{index}].type' is '{part.type[:SHOWN]}'; results are text here",
                param=f"{place}.content[{index}].type",
            )
    return _joined(block.content)


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(block.text or "" for block in content)


def _is_text_of_assistant(message: Message) -> bool:
    """Whether the answer goes on where a last message of the assistant ends."""
    return message.role == "assistant" and bool(message.content) and not message.tool_calls
