"""From the sampling fields of a request body to the engine's `Sampling`.

A parameter that has one name in `SamplingFields` (schema.py) and in `Sampling` (engine/protocol.py) is
passed on by that name: the request's value, else the model's (`SamplingDefaults`), else Sampling's own
default. To add one, add it to those two classes and to the engine; only what is not one to one is written
out here. Does not know routes. Start at `sampling`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from runtime.errors import ContextLengthError, RequestError
from runtime.serving.engine.protocol import Sampling
from runtime.serving.generation import TextRules
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http.schema import SamplingFields
from runtime.serving.tokenizer import PromptTokenizer

OWN_WAY = {"temperature", "bad_words_ids", "forced_eos_token_id"}
"""Parameters of this name in both classes that need code of their own."""
PASSED_ON = {field.name for field in fields(Sampling)} & SamplingFields.model_fields.keys() - OWN_WAY
"""Parameters that need no code of their own on their way from the body to the engine."""


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """How long an answer may be, as the request states it; both None leaves it to the server."""

    new_tokens: int | None = None
    total_tokens: int | None = None
    """Prompt and answer together (transformers' `max_length`)."""
    param: str = "max_tokens"
    """The field to name when it does not fit."""


async def sampling(
    body: SamplingFields,
    tokenizer: PromptTokenizer,
    *,
    max_new_tokens: int,
    sample: bool | None = None,
    top_logprobs: int | None = None,
) -> Sampling:
    """Return the sampling that `body` asks for, the model's own where it does not say.

    Args:
        sample: False is greedy, True samples; None leaves it to temperature, top_p, top_k and min_p.
        top_logprobs: alternatives to report per token; None reports no log probabilities.

    Raises RequestError for token ids that the vocabulary does not have, and a shortest answer that is
    longer than the longest.
    """
    _check_ids(body, tokenizer)
    check_shortest(body.min_tokens or 0, max_new_tokens)
    defaults = tokenizer.defaults
    own = {field.name: getattr(defaults, field.name) for field in fields(defaults) if field.name in PASSED_ON}
    requested = {name: value for name in PASSED_ON if (value := getattr(body, name)) is not None}
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=_temperature(body, defaults, sample),
        stop_ids=_stop_ids(body, tokenizer),
        min_new_tokens=body.min_tokens or 0,
        bad_words_ids=await _bad_words_ids(body, tokenizer),
        forced_eos_token_id=_listed(body.forced_eos_token_id),
        top_logprobs=top_logprobs,
        **(own | requested),
    )


def _check_ids(body: SamplingFields, tokenizer: PromptTokenizer) -> None:
    for name in ("suppress_tokens", "begin_suppress_tokens", "allowed_token_ids", "stop_token_ids"):
        tokenizer.check_ids(getattr(body, name) or (), name)
    for name in ("eos_token_id", "forced_eos_token_id"):
        tokenizer.check_ids(_listed(getattr(body, name)), name)
    tokenizer.check_ids(tuple(body.logit_bias or ()), "logit_bias")
    for word in body.bad_words_ids or ():
        tokenizer.check_ids(word, "bad_words_ids")


def _listed(ids: int | Sequence[int] | None) -> Sequence[int]:
    """Return ids that may be sent as one number."""
    return [ids] if isinstance(ids, int) else ids or []


def _stop_ids(body: SamplingFields, tokenizer: PromptTokenizer) -> frozenset[int]:
    """Return the ids that end the answer: a stop string that is a special token is never seen as text."""
    end_ids = tokenizer.stop_ids if body.eos_token_id is None else frozenset(_listed(body.eos_token_id))
    as_texts = () if body.include_stop_str_in_output else tokenizer.special_ids(body.stops())
    return (frozenset() if body.ignore_eos else end_ids).union(body.stop_token_ids or (), as_texts)


async def _bad_words_ids(body: SamplingFields, tokenizer: PromptTokenizer) -> Sequence[Sequence[int]]:
    if body.bad_words and body.bad_words_ids:
        raise RequestError("'bad_words' and 'bad_words_ids' exclude each other", param="bad_words_ids")
    return await tokenizer.spellings(body.bad_words) if body.bad_words else body.bad_words_ids or ()


def text_rules(body: SamplingFields) -> TextRules:
    """Return what `body` says about the answer's text."""
    return TextRules(
        body.stops(),
        includes_stop=body.include_stop_str_in_output,
        shows_special=not body.skip_special_tokens,
    )


def _temperature(body: SamplingFields, defaults: SamplingDefaults, sample: bool | None) -> float:
    if sample is False:
        return 0.0
    if body.temperature is not None:
        return body.temperature
    samples = sample or any(value is not None for value in (body.top_p, body.top_k, body.min_p))
    return defaults.sampled_temperature if samples else defaults.temperature


def check_shortest(shortest: int, longest: int, *, param: str = "min_tokens") -> None:
    """Raise RequestError where an answer must be longer than it may be; `param` is the field that says so."""
    if shortest > longest:
        raise RequestError(
            f"'{param}' asks for at least {shortest} tokens of an answer that may have {longest} at most: "
            "lower it, or allow a longer answer",
            param=param,
        )


def max_new_tokens(length: AnswerLength, tokenizer: PromptTokenizer, *, prompt_tokens: int) -> int:
    """Return the longest answer to a prompt; RequestError when the requested length does not fit."""
    left = tokenizer.context_tokens - prompt_tokens
    if length.new_tokens is not None:
        if length.new_tokens > left:
            raise ContextLengthError(
                tokenizer.context_tokens, prompt_tokens, length.new_tokens, param=length.param
            )
        return length.new_tokens
    if length.total_tokens is not None:
        if length.total_tokens <= prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, '{length.param}' {length.total_tokens} counts "
                "them too and leaves none for the answer: raise it, or use max_new_tokens",
                param=length.param,
            )
        return min(length.total_tokens - prompt_tokens, left)
    return min(tokenizer.default_new_tokens, left)
