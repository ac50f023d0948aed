"""From the sampling fields of a request body to the engine's `Sampling`.

A parameter that has one name in `SamplingFields` (schema.py) and in `Sampling` (engine/protocol.py) is
passed on by that name: the request's value, else the model's (`SamplingDefaults`), else Sampling's own
default. To add one, add it to those two classes and to the engine; only what is not one to one is written
out here. Does not know routes. Start at `sampling`.
"""

import re
from dataclasses import dataclass, fields

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Constraint, Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http.schema import SamplingFields
from runtime.serving.structured_output import json_object
from runtime.serving.tokenizer import PromptTokenizer

PASSED_ON = {field.name for field in fields(Sampling)} & SamplingFields.model_fields.keys() - {"temperature"}
"""Parameters that need no code of their own on their way from the body to the engine."""


@dataclass(frozen=True, slots=True)
class AnswerLength:
    """How long an answer may be, as the request states it; both None leaves it to the server."""

    new_tokens: int | None = None
    total_tokens: int | None = None
    """Prompt and answer together (transformers' `max_length`)."""
    param: str = "max_tokens"
    """The field to name when it does not fit."""


def sampling(
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
    """
    tokenizer.check_ids(tuple(body.logit_bias or ()), "logit_bias")
    defaults = tokenizer.defaults
    own = {field.name: getattr(defaults, field.name) for field in fields(defaults) if field.name in PASSED_ON}
    requested = {name: value for name in PASSED_ON if (value := getattr(body, name)) is not None}
    end_ids = frozenset() if body.ignore_eos else tokenizer.stop_ids
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=_temperature(body, defaults, sample),
        stop_ids=end_ids | frozenset(body.stop_token_ids or ()),
        min_new_tokens=min(body.min_tokens or 0, max_new_tokens),
        top_logprobs=top_logprobs,
        **(own | requested),
    )


def _temperature(body: SamplingFields, defaults: SamplingDefaults, sample: bool | None) -> float:
    if sample is False:
        return 0.0
    if body.temperature is not None:
        return body.temperature
    samples = sample or any(value is not None for value in (body.top_p, body.top_k, body.min_p))
    return defaults.sampled_temperature if samples else defaults.temperature


def max_new_tokens(length: AnswerLength, tokenizer: PromptTokenizer, *, prompt_tokens: int) -> int:
    """Return the longest answer to a prompt; RequestError when the requested length does not fit."""
    left = tokenizer.context_tokens - prompt_tokens
    if length.new_tokens is not None:
        if length.new_tokens > left:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and '{length.param}' asks for "
                f"{length.new_tokens} more; together at most {tokenizer.context_tokens}: "
                f"ask for {left} or shorten the prompt",
                param=length.param,
                code="context_length_exceeded",
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


def constraint(body: SamplingFields) -> Constraint | None:
    """Return the constraint that a request asks for, None for free text.

    Raises RequestError for an unknown response_format, or more than one constraint.
    """
    constraints = []
    if (from_format := _format_constraint(body)) is not None:
        constraints.append(from_format)
    if body.guided_json is not None:
        constraints.append(Constraint("schema", body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        constraints.append(Constraint("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice is not None:
        either = "|".join(f"(?:{re.escape(text)})" for text in body.guided_choice)
        constraints.append(Constraint("regex", either, "guided_choice"))
    if len(constraints) > 1:
        first, second = constraints[0].param, constraints[1].param
        raise RequestError(f"'{first}' and '{second}' exclude each other", param=second)
    return constraints[0] if constraints else None


def _format_constraint(body: SamplingFields) -> Constraint | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type not in {"json_object", "json_schema"}:
        raise RequestError(
            f"response_format '{wanted.type}' is not one of text, json_object, json_schema",
            param="response_format",
        )
    if wanted.type == "json_object":
        return json_object("response_format")
    if wanted.json_schema is None:
        raise RequestError("response_format json_schema needs 'json_schema'", param="response_format")
    if wanted.json_schema.schema_ is None:
        return json_object("response_format")
    return Constraint("schema", wanted.json_schema.schema_, "response_format")
