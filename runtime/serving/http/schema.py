"""What clients may send: bodies of /chat and of the OpenAI routes.

Unknown fields are ignored here, unlike in configuration: SDKs add new ones and old clients send dead
ones. Known fields are checked for type and range. Knows no model and no tokenizer, and never imports
torch. Start at `SamplingFields`, then `ChatBody` and `ChatCompletionBody`.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from runtime.errors import RequestError

MAX_CHOICES = 8
"""Answers to one request (`n`): each is a sequence of the engine."""
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_CHOICE_TEXTS = 256
MAX_LOGPROBS = 20
MAX_NGRAM = 64
MAX_BAD_WORDS = 1024
MAX_BANNED = 4096
MAX_ALLOWED = 2**16

SEED_LIMIT = 2**63


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair: JSON can write it, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
ShortText = Annotated[Text, Field(max_length=256)]
Name = Annotated[Text, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
EndIds = TokenId | Annotated[list[TokenId], Field(max_length=MAX_STOPS)]
BannedIds = Annotated[list[TokenId], Field(max_length=MAX_BANNED)]
BadWord = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_NGRAM)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda k: max(k, 0))]


class Body(BaseModel):
    """Base of all request bodies: unknown keys are ignored, NaN and Infinity are not numbers."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        populate_by_name=True,
    )


class JsonSchema(Body):
    """The schema of `response_format`."""

    name: Name = "answer"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """None is any object."""


class ResponseFormat(Body):
    """What the answer must be: text, json_object or json_schema."""

    type: Name = "text"
    json_schema: JsonSchema | None = None


class SamplingFields(Body):
    """How tokens are chosen; None takes the model's own generation_config."""

    temperature: float | None = Field(None, ge=0, le=100)
    """0 always takes the likeliest token."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Keep the likeliest tokens that make up this share of the probability."""
    top_k: TopK | None = None
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    """Above 1 makes tokens seen in prompt and answer less likely."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from the logit of every token of the answer so far."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted once per occurrence in the answer so far."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES
    )
    """Added to the logits, by token id."""
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    """Same seed, prompt and settings: same text."""
    stop: ShortText | Annotated[list[ShortText], Field(max_length=MAX_STOPS)] | None = None
    """Strings that end the answer; they are not part of it. Empty ones are ignored."""
    include_stop_str_in_output: bool = False
    """Make the stop string that ends the answer part of it."""
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)
    """Token ids that end the answer, beside the model's own."""
    ignore_eos: bool = False
    """Do not stop at the model's end token."""
    eos_token_id: EndIds | None = None
    """The token ids that end the answer, in place of the model's own."""
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    """Tokens before the answer may end, by an end token or a stop string."""
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=MAX_NGRAM)
    """No run of this many tokens occurs twice in prompt and answer; 0 allows all."""
    bad_words: Annotated[list[ShortText], Field(max_length=MAX_BANNED // MAX_NGRAM)] | None = None
    """Texts that the answer does not contain, with and without a space before them."""
    bad_words_ids: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    """Sequences of token ids that the answer does not complete."""
    suppress_tokens: BannedIds | None = None
    """Token ids that are never chosen."""
    begin_suppress_tokens: BannedIds | None = None
    """Token ids that are not chosen first."""
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    """The only token ids that are chosen."""
    forced_eos_token_id: EndIds | None = None
    """The token id, or one of these, that is the last one of an answer of the full length."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text."""
    response_format: ResponseFormat | None = None
    """What the answer must be: text, json_object or json_schema."""
    guided_json: dict[str, Any] | None = None
    """The same as a response_format json_schema with this schema."""
    guided_regex: Annotated[Text, Field(max_length=4096)] | None = None
    """A regular expression that the answer matches as a whole."""
    guided_choice: Annotated[list[ShortText], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = None
    """The answer is one of these texts."""

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple, however they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(Body):
    """One text part of a message's content."""

    type: Name
    text: Text | None = None


class FunctionCall(Body):
    """A function the model called, with its arguments as JSON text."""

    name: Name
    arguments: Text = "{}"


class ToolCall(Body):
    """One tool call of an assistant's message."""

    id: Name = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn of a conversation."""

    role: Name
    """system, user, assistant, tool, or whatever the model's template knows."""
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None

    def as_turn(self, index: int) -> dict[str, Any]:
        """Return the message as chat templates know it: text parts joined, absent keys absent.

        Raises RequestError, naming the message by its `index`, for content that is not text.
        """
        content = self.content
        if isinstance(content, list):
            other = next((part.type for part in content if part.type != "text" or part.text is None), None)
            if other is not None:
                raise RequestError(
                    f"content parts of type '{other}' are not served here, only 'text'",
                    param=f"messages[{index}].content",
                )
            content = "".join(part.text or "" for part in content)
        if content is None and not self.tool_calls:
            raise RequestError("a message needs 'content'", param=f"messages[{index}].content")
        turn: dict[str, Any] = {"role": self.role, "content": content or ""}
        if self.tool_calls:
            turn["tool_calls"] = [_tool_call(call, index) for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return a conversation as chat templates know it."""
    return [message.as_turn(index) for index, message in enumerate(messages)]


def _tool_call(call: ToolCall, index: int) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, which is what templates print."""
    fields = call.model_dump()
    try:
        fields["function"]["arguments"] = json.loads(call.function.arguments)
    except ValueError:
        raise RequestError(
            "'arguments' of a tool call must be JSON text", param=f"messages[{index}].tool_calls"
        ) from None
    return fields


class GenerateFields(SamplingFields):
    """The parameters of /chat, by the names `transformers.generate` gives them."""

    do_sample: bool | None = None
    """False always takes the likeliest token; None takes the model's own setting."""
    max_new_tokens: TokenCount | None = None
    """Longest answer, in tokens."""
    max_length: TokenCount | None = None
    """Longest prompt and answer together, in tokens."""
    min_new_tokens: int | None = Field(None, ge=0, lt=2**31)
    """transformers' name for `min_tokens`."""
    min_length: int | None = Field(None, ge=0, lt=2**31)
    """Shortest prompt and answer together, in tokens, where `min_new_tokens` does not say."""
    max_tokens: TokenCount | None = None
    """OpenAI's name for `max_new_tokens`."""
    max_gen_len: TokenCount | None = None
    """llama-2's name for `max_new_tokens`."""
    stop_strings: ShortText | Annotated[list[ShortText], Field(max_length=MAX_STOPS)] | None = None
    """transformers' name for `stop`."""
    num_beams: int = Field(1, ge=1)
    """Only 1: beam search is not supported."""
    num_return_sequences: int = Field(1, ge=1)
    """Only 1."""
    typical_p: float = Field(1.0, gt=0, le=1)
    """Only 1: typical sampling is not supported."""


class ChatBody(GenerateFields):
    """POST /chat: a `prompt` or `messages`, with parameters flat or under `generate_kwargs`."""

    prompt: Text | None = None
    """One user turn; with `raw`, the text to continue."""
    messages: list[Message] | None = None
    """A whole conversation."""
    generate_kwargs: GenerateFields | None = None
    """Parameters; they take precedence over the flat ones."""
    parameters: GenerateFields | None = None
    """Another name for `generate_kwargs`."""
    return_full_text: bool = False
    """Put the prompt before the answer."""
    raw: bool = False
    """Continue `prompt` as it stands, without the chat template."""
    stream: bool = False
    """Answer with server-sent events."""
    model: Name | None = None
    """The base model or an adapter; None is the base model."""
    adapter: Name | None = None
    """The same as `model`; takes precedence over it."""
    prefix: Text | None = None
    """Text put before `prompt`."""
    input_data: Any = None
    """Refused: llama-2's request shape, superseded by `messages`."""

    def merged_parameters(self) -> GenerateFields:
        """Return the flat parameters, overridden by `parameters` and then by `generate_kwargs`."""
        merged: GenerateFields = self
        for nested in (self.parameters, self.generate_kwargs):
            if nested is not None:
                merged = merged.model_copy(update={k: getattr(nested, k) for k in nested.model_fields_set})
        return merged


class StreamOptions(Body):
    """What a stream carries in addition to the text."""

    include_usage: bool = False
    """Send one more chunk with the token counts before [DONE]."""


class FunctionTool(Body):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """One tool of a request; only functions exist."""

    type: Name = "function"
    function: FunctionTool


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class ToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class OpenAIFields(SamplingFields):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: Name | None = None
    """The base model or an adapter; None is the base model."""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    """Answers to give."""
    max_tokens: TokenCount | None = None
    """Longest answer, in tokens."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Ignored."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(OpenAIFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = None
    """Longest answer, in tokens; takes precedence over `max_tokens`."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    """Whether the model may or must call a function; an object names one that it must call."""
    include_reasoning: bool | None = None
    """Whether the answer shows the model's reasoning; refused where the server was started to separate it."""
    functions: Any = None
    """Superseded by `tools`, refused."""
    modalities: Any = None
    audio: Any = None


class CompletionBody(OpenAIFields):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(max_length=MAX_CHOICES)] | list[TokenId] | list[list[TokenId]]
    echo: bool = False
    """Put the prompt before the answer."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1)
    suffix: Text | None = None


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error; outside /v1 also with `detail`, which repeats the message."""

    error: ErrorDetail
    detail: str | None = None
