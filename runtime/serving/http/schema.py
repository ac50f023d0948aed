"""What clients may send: bodies of /chat and of the OpenAI routes.

Known fields are checked for type and range; what becomes of the others, fields.py says. Conversations are
in messages.py, tools in tool_fields.py. Knows no model and no tokenizer, and never imports torch. Start at
`SamplingFields`, then `ChatBody` and `ChatCompletionBody`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from runtime.serving.http import fields
from runtime.serving.http.body_types import (
    Biases,
    Body,
    Flag,
    Integer,
    Name,
    Number,
    ShortText,
    Text,
    TokenCount,
    TokenId,
    TokenIds,
    TopK,
    by_kind,
    integral,
)
from runtime.serving.http.constraint_fields import ConstraintFields
from runtime.serving.http.messages import Messages
from runtime.serving.http.template_fields import TemplateFields
from runtime.serving.http.tool_fields import ToolFields

MAX_CHOICES = 8
"""Answers to one prompt (`n`): each is a sequence of the engine."""
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_NGRAM = 64
MAX_BAD_WORDS = 1024
MAX_BANNED = 4096
MAX_ALLOWED = 2**16


Stops = Annotated[
    Annotated[ShortText, Tag("<text>")]
    | Annotated[list[ShortText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<texts>")],
    by_kind("a string or a list of strings", {str: "<text>", list: "<texts>"}),
]
StopIds = Annotated[TokenIds, Field(max_length=MAX_STOPS)]
EndIds = Annotated[
    Annotated[TokenId, BeforeValidator(integral), Tag("<id>")] | Annotated[StopIds, Tag("<ids>")],
    by_kind("a token id or a list of token ids", {int: "<id>", float: "<id>", list: "<ids>"}),
]
BannedIds = Annotated[TokenIds, Field(max_length=MAX_BANNED)]
BadWord = Annotated[TokenIds, Field(min_length=1, max_length=MAX_NGRAM)]


class SamplingFields(ConstraintFields):
    """How tokens are chosen; None takes the model's own generation_config."""

    treatments = fields.GENERATION

    temperature: Number | None = Field(None, ge=0, le=100)
    """0 always takes the likeliest token."""
    top_p: Number | None = Field(None, ge=0, le=1)
    """Keep the likeliest tokens that make up this share of the probability."""
    top_k: TopK | None = None
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    min_p: Number | None = Field(None, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    """Above 1 makes tokens seen in prompt and answer less likely."""
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    """Subtracted from the logit of every token of the answer so far."""
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    """Subtracted once per occurrence in the answer so far."""
    logit_bias: Biases | None = None
    """Added to the logits, by token id."""
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    """Same seed, prompt and settings: same text. A number of 64 bits, with or without a sign."""
    stop: Stops | None = None
    """Strings that end the answer; they are not part of it. Empty ones are ignored."""
    include_stop_str_in_output: Flag = False
    """Make the stop string that ends the answer part of it."""
    stop_token_ids: StopIds | None = None
    """Token ids that end the answer, beside the model's own."""
    ignore_eos: Flag = False
    """Do not stop at the model's end token."""
    eos_token_id: EndIds | None = None
    """The token ids that end the answer, in place of the model's own."""
    min_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    """Tokens before the answer may end, by an end token or a stop string."""
    no_repeat_ngram_size: Integer | None = Field(None, ge=0, le=MAX_NGRAM)
    """No run of this many tokens occurs twice in prompt and answer; 0 allows all."""
    bad_words: (
        Annotated[list[ShortText], Field(max_length=MAX_BANNED // MAX_NGRAM, fail_fast=True)] | None
    ) = None
    """Texts that the answer does not contain, with and without a space before them."""
    bad_words_ids: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    """Sequences of token ids that the answer does not complete."""
    suppress_tokens: BannedIds | None = None
    """Token ids that are never chosen."""
    begin_suppress_tokens: BannedIds | None = None
    """Token ids that are not chosen first."""
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_ALLOWED)] | None = None
    """The only token ids that are chosen."""
    forced_eos_token_id: EndIds | None = None
    """The token id, or one of these, that is the last one of an answer of the full length."""
    skip_special_tokens: Flag = True
    """Leave special tokens out of the answer's text."""

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple, however they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def chosen(self) -> dict[str, Any]:
        """Return the fields of sampling and of constraints that the request has, by their names."""
        names = SamplingFields.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names}


class GenerateFields(SamplingFields):
    """The parameters of /chat, by the names `transformers.generate` gives them."""

    do_sample: Flag | None = None
    """False always takes the likeliest token; None takes the model's own setting."""
    max_new_tokens: TokenCount | None = None
    """Longest answer, in tokens."""
    max_length: TokenCount | None = None
    """Longest prompt and answer together, in tokens."""
    min_new_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    """transformers' name for `min_tokens`."""
    min_length: Integer | None = Field(None, ge=0, lt=2**31)
    """Shortest prompt and answer together, in tokens, where `min_new_tokens` does not say."""
    max_tokens: TokenCount | None = None
    """OpenAI's name for `max_new_tokens`."""
    max_gen_len: TokenCount | None = None
    """llama-2's name for `max_new_tokens`."""
    stop_strings: Stops | None = None
    """transformers' name for `stop`."""
    num_beams: Integer = Field(1, ge=1)
    """Only 1: beam search is not supported."""
    num_return_sequences: Integer = Field(1, ge=1)
    """Only 1."""
    typical_p: Number = Field(1.0, gt=0, le=1)
    """Only 1: typical sampling is not supported."""


class ChatBody(GenerateFields):
    """POST /chat: a `prompt` or `messages`, with parameters flat or under `generate_kwargs`."""

    treatments = fields.CHAT

    prompt: Text | None = None
    """One user turn; with `raw`, the text to continue."""
    messages: Messages | None = None
    """A whole conversation."""
    generate_kwargs: GenerateFields | None = None
    """Parameters; they take precedence over the flat ones."""
    parameters: GenerateFields | None = None
    """Another name for `generate_kwargs`."""
    return_full_text: Flag = False
    """Put the prompt before the answer."""
    raw: Flag = False
    """Continue `prompt` as it stands, without the chat template."""
    stream: Flag = False
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

    treatments = fields.STREAM

    include_usage: Flag = False
    """Send one more chunk with the token counts before [DONE]."""


class OpenAIFields(SamplingFields):
    """What /v1/chat/completions and /v1/completions have in common."""

    model: Name | None = None
    """The base model or an adapter; None is the base model."""
    n: Integer = Field(1, ge=1, le=MAX_CHOICES)
    """Answers to give."""
    max_tokens: TokenCount | None = None
    """Longest answer, in tokens."""
    stream: Flag = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionBody(OpenAIFields, TemplateFields, ToolFields):
    """POST /v1/chat/completions."""

    treatments = fields.CHAT_COMPLETION

    messages: Messages = Field(min_length=1)
    max_completion_tokens: TokenCount | None = None
    """Longest answer, in tokens; takes precedence over `max_tokens`."""
    logprobs: Flag = False
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: Flag = True
    """Whether one answer may hold several calls; false: the first of them."""
    include_reasoning: Flag | None = None
    """False leaves the model's reasoning out of the answer."""


@dataclass(frozen=True, slots=True)
class Wording:
    """What a route that asks for a chat completion calls its parts; refusals name these."""

    messages: str = "messages"
    places: Sequence[int] | None = None
    """The indices within `messages` that the messages were made of, where these are not 0, 1, 2…."""
    length: str = "max_tokens"
    format: str = "response_format"


OWN_WORDING = Wording()
"""Of /v1/chat/completions itself."""


def _prompt_kind(value: Any) -> str | None:
    """Return which kind of prompt a value is, by its first entry."""
    if not isinstance(value, list):
        return "<text>" if isinstance(value, str) else None
    kinds = {str: "<texts>", int: "<ids>", float: "<ids>", list: "<id lists>"}
    return kinds.get(type(value[0])) if value else "<texts>"


Prompts = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("<id lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="kind",
        custom_error_message="must be a string, a list of strings, token ids, or lists of token ids",
    ),
]


class CompletionBody(OpenAIFields):
    """POST /v1/completions."""

    treatments = fields.COMPLETION

    prompt: Prompts
    """One prompt or a list of them: with `n` each, as many answers as requests may run and wait at a time."""
    echo: Flag = False
    """Put the prompt before the answer; with `logprobs`, its tokens and their log probabilities too."""
    max_tokens: Annotated[Integer, Field(ge=0, lt=2**31)] | None = None
    """Longest answer, in tokens; 0, with `echo`, has the prompt scored and nothing generated."""
    add_special_tokens: Flag = True
    """Put the tokenizer's opening tokens before a prompt that is a text."""
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Integer | None = Field(None, ge=1)
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
