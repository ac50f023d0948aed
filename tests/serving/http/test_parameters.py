"""The way of a sampling parameter from the body to the engine."""

from dataclasses import fields
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http.parameters import PASSED_ON, AnswerLength, max_new_tokens, sampling
from runtime.serving.http.schema import SamplingFields
from runtime.serving.tokenizer import PromptTokenizer

OWN_WAY = {"temperature", "max_new_tokens", "stop_ids", "min_new_tokens", "grammar", "top_logprobs"}
"""Fields of `Sampling` that do not come from one field of the body."""


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> PromptTokenizer:
    return PromptTokenizer(
        tokenizer,
        context_tokens=64,
        new_tokens=16,
        stop_ids=frozenset({2}),
        defaults=SamplingDefaults(temperature=0.0, sampled_temperature=0.7, top_p=0.9, top_k=20),
    )


def test_every_parameter_of_the_engine_can_be_set_by_a_request() -> None:
    assert {field.name for field in fields(Sampling)} == PASSED_ON | OWN_WAY


def test_request_wins_over_the_model_and_the_model_over_the_default(prompts: PromptTokenizer) -> None:
    body = SamplingFields(top_k=-1, presence_penalty=1.5, logit_bias={5: 2.0}, stop_token_ids=[7])
    made = sampling(body, prompts, max_new_tokens=4)
    assert (made.top_k, made.top_p, made.min_p) == (0, 0.9, 0.0)
    assert (made.temperature, made.presence_penalty, made.logit_bias) == (0.7, 1.5, {5: 2.0})
    assert made.stop_ids == {2, 7}
    assert sampling(SamplingFields(), prompts, max_new_tokens=4).temperature == 0.0


def test_sample_false_is_greedy_and_min_tokens_fit_the_answer(prompts: PromptTokenizer) -> None:
    body = SamplingFields(temperature=0.9, min_tokens=9, ignore_eos=True)
    made = sampling(body, prompts, max_new_tokens=4, sample=False)
    assert (made.temperature, made.min_new_tokens, made.stop_ids) == (0.0, 4, frozenset())


def test_unknown_token_id_in_logit_bias_is_refused(prompts: PromptTokenizer) -> None:
    with pytest.raises(RequestError, match="token id 100000 is not in the vocabulary"):
        sampling(SamplingFields(logit_bias={100000: 1.0}), prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (AnswerLength(), 16),
        (AnswerLength(new_tokens=54), 54),
        (AnswerLength(total_tokens=30), 20),
        (AnswerLength(total_tokens=1000), 54),
    ],
)
def test_answer_length(prompts: PromptTokenizer, length: AnswerLength, expected: int) -> None:
    assert max_new_tokens(length, prompts, prompt_tokens=10) == expected


@pytest.mark.parametrize("length", [AnswerLength(new_tokens=55), AnswerLength(total_tokens=10)])
def test_answer_that_does_not_fit_names_its_field(prompts: PromptTokenizer, length: AnswerLength) -> None:
    with pytest.raises(RequestError, match="'max_tokens'") as caught:
        max_new_tokens(length, prompts, prompt_tokens=10)
    assert caught.value.param == "max_tokens"
