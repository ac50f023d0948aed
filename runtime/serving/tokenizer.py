"""From a request to token ids and sampling settings, and from token ids back to text.

The only part of serving that knows the tokenizer. Templates come from the model and never from a
request, and transformers renders them in Jinja's immutable sandbox. Does not know HTTP or the engine's
state. Start at `PromptTokenizer.chat`.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Sampling
from runtime.serving.http.schema import Message, SamplingFields
from runtime.serving.structured_output import Constraint, GrammarCompiler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The model's own generation_config: what a silent request gets."""

    temperature: float = 0.0
    """0 when the model does not ask for sampling, as transformers' `generate` has it."""
    sampled_temperature: float = 1.0
    """The temperature of a request that asks for sampling without naming one."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """Return the defaults that a model's generation_config states; what it leaves out is neutral."""
    temperature = float(generation_config.get("temperature") or 1.0)
    return SamplingDefaults(
        temperature=temperature if generation_config.get("do_sample") else 0.0,
        sampled_temperature=temperature,
        top_p=float(generation_config.get("top_p") or 1.0),
        top_k=int(generation_config.get("top_k") or 0),
        min_p=float(generation_config.get("min_p") or 0.0),
        repetition_penalty=float(generation_config.get("repetition_penalty") or 1.0),
    )


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """How long an answer may be, as the request said it; None where it said nothing."""

    new_tokens: int | None = None
    total_tokens: int | None = None
    """Prompt and answer together (transformers' `max_length`)."""
    param: str = "max_tokens"
    """The field to name when it does not fit."""


class PromptTokenizer:
    """One model's tokenizer and limits."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_tokens: int,
        new_tokens: int,
        stop_ids: frozenset[int],
        defaults: SamplingDefaults,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_tokens = context_tokens
        self.stop_ids = stop_ids
        self._new_tokens = new_tokens
        self._defaults = defaults
        self._vocabulary = len(tokenizer)
        self._grammars = GrammarCompiler(tokenizer, stop_ids)
        # One thread: long prompts do not block the event loop, and the tokenizer is never entered twice.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Let the tokenizer's thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> tuple[int, ...]:
        """Return a short prompt, for a first generation that proves the engine works."""
        return self.ids(self.tokenizer.encode("Hello"))

    @property
    def template(self) -> str:
        """The chat template, "" when the model has none."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else ""

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        param: str = "messages",
    ) -> tuple[int, ...]:
        """Return the token ids of a conversation, up to where the assistant begins to speak.

        Raises RequestError: no template, a role or order it refuses, or too many tokens.
        """
        turns = [_turn(message, index) for index, message in enumerate(messages)]
        if not self.tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or /chat with 'prompt'",
                param=param,
            )
        return self._checked(await self._threaded(lambda: self._render(turns, tools)), param)

    async def text(self, text: str, *, param: str = "prompt") -> tuple[int, ...]:
        """Return the token ids of `text` as it stands, with the tokenizer's opening tokens."""
        return self._checked(await self._threaded(lambda: self.tokenizer.encode(text)), param)

    def ids(self, ids: Sequence[int], *, param: str = "prompt") -> tuple[int, ...]:
        """Return token ids that a client sent, checked against vocabulary and context."""
        wrong = next((i for i in ids if i >= self._vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is not in the vocabulary of {self._vocabulary}", param=param
            )
        return self._checked(ids, param)

    async def count(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`, however long it is."""
        return await self._threaded(lambda: self.tokenizer.encode(text, add_special_tokens=special))

    async def rendered(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, however long it is."""
        turns = [_turn(message, index) for index, message in enumerate(messages)]
        return await self._threaded(lambda: self._render(turns, None))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def written(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens too; RequestError for an id that is none."""
        self._check_known(ids, "tokens")
        return str(self.tokenizer.decode(list(ids)))

    def token_text(self, token: int) -> str:
        """Return one token as text, special tokens too; U+FFFD where it is part of a character."""
        return str(self.tokenizer.decode([token]))

    def sampling(
        self,
        fields: SamplingFields,
        *,
        prompt_tokens: int,
        extent: AnswerLength,
        sample: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Sampling:
        """Return the settings of a request, the model's own where it is silent.

        Args:
            sample: False is greedy, True samples; None lets temperature, top_p, top_k and min_p say.
        """
        defaults = self._defaults
        asked = any(v is not None for v in (fields.top_p, fields.top_k, fields.min_p))
        temperature = fields.temperature
        if sample is False:
            temperature = 0.0
        elif temperature is None:
            temperature = defaults.sampled_temperature if sample or asked else defaults.temperature
        bias = fields.logit_bias or {}
        self._check_known(tuple(bias), "logit_bias")
        max_new_tokens = self._room(prompt_tokens, extent)
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=_given(fields.top_p, defaults.top_p),
            top_k=max(0, _given(fields.top_k, defaults.top_k)),
            min_p=_given(fields.min_p, defaults.min_p),
            repetition_penalty=_given(fields.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_given(fields.presence_penalty, 0.0),
            frequency_penalty=_given(fields.frequency_penalty, 0.0),
            logit_bias=bias,
            seed=fields.seed,
            stop_ids=frozenset(fields.stop_token_ids or ())
            | (frozenset() if fields.ignore_eos else self.stop_ids),
            min_new_tokens=min(_given(fields.min_tokens, 0), max_new_tokens),
            top_logprobs=top_logprobs,
        )

    async def shaped(self, sampling: Sampling, form: Constraint | None) -> Sampling:
        """Return `sampling` for an answer that must have `form`; it then ends where the form is complete."""
        if form is None:
            return sampling
        grammar = await self._threaded(lambda: self._grammars.compile(form))
        return replace(
            sampling, grammar=grammar, min_new_tokens=0, stop_ids=sampling.stop_ids | self.stop_ids
        )

    def _check_known(self, ids: Sequence[int], param: str) -> None:
        wrong = next((i for i in ids if i >= self._vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is not in the vocabulary of {self._vocabulary}", param=param
            )

    def _room(self, prompt_tokens: int, extent: AnswerLength) -> int:
        left = self.context_tokens - prompt_tokens
        if extent.new_tokens is not None:
            if extent.new_tokens > left:
                raise RequestError(
                    f"the prompt has {prompt_tokens} tokens and '{extent.param}' asks for "
                    f"{extent.new_tokens} more; together at most {self.context_tokens}: "
                    f"ask for {left} or shorten the prompt",
                    param=extent.param,
                    code="context_length_exceeded",
                )
            return extent.new_tokens
        if extent.total_tokens is not None:
            if extent.total_tokens <= prompt_tokens:
                raise RequestError(
                    f"the prompt has {prompt_tokens} tokens, '{extent.param}' {extent.total_tokens} counts "
                    "them too and leaves none for the answer: raise it, or use max_new_tokens",
                    param=extent.param,
                )
            return min(extent.total_tokens - prompt_tokens, left)
        return min(self._new_tokens, left)

    def _checked(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        if not ids:
            raise RequestError("the prompt has no tokens; send some text", param=param)
        if len(ids) >= self.context_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; prompt and answer together may have "
                f"{self.context_tokens}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return tuple(ids)

    def _render(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=tools,  # type: ignore[arg-type]  # the stub knows lists of one kind only
                tokenize=False,
                add_generation_prompt=True,
            )
            return list(self.tokenizer.encode(str(text), add_special_tokens=False))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            # A template refuses roles and orders it does not know by raising whatever it likes.
            reason = " ".join(str(error).split())[:200]
            raise RequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from None

    async def _threaded(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _turn(message: Message, index: int) -> dict[str, Any]:
    """Return a message as chat templates know it: text parts joined, absent keys absent."""
    content = message.content
    if isinstance(content, list):
        other = next((part.type for part in content if part.type != "text" or part.text is None), None)
        if other is not None:
            raise RequestError(
                f"content parts of type '{other}' are not served here, only 'text'",
                param=f"messages[{index}].content",
            )
        content = "".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise RequestError("a message needs 'content'", param=f"messages[{index}].content")
    turn: dict[str, Any] = {"role": message.role, "content": content or ""}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call.model_dump(), index) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _call(call: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a tool call with its arguments as a mapping, which is what templates print."""
    import json

    try:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    except ValueError:
        raise RequestError(
            "'arguments' of a tool call must be JSON text", param=f"messages[{index}].tool_calls"
        ) from None
    return call


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
