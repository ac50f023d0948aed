"""The way of a sampling parameter from the body to the engine."""

import asyncio
from dataclasses import fields
from typing import Any

import pytest

from runtime.errors import RequestError
from runtime.serving.engine.protocol import Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http import parameters
from runtime.serving.http.parameters import PASSED_ON, AnswerLength, max_new_tokens
from runtime.serving.http.schema import SamplingFields
from runtime.serving.tokenizer import PromptTokenizer

OWN_WAY = {
    "temperature", "max_new_tokens", "stop_ids", "min_new_tokens", "grammar", "top_logprobs", "bad_words_ids",
    "forced_eos_token_id", "prompt_logprobs",
}  # fmt: skip
"""Fields of `Sampling` that do not come from one field of the body."""


def sampling(body: SamplingFields, tokenizer: PromptTokenizer, **options: Any) -> Sampling:
    return asyncio.run(parameters.sampling(body, tokenizer, **options))


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


def test_sample_false_is_greedy_and_min_tokens_reach_the_engine(prompts: PromptTokenizer) -> None:
    body = SamplingFields(temperature=0.9, min_tokens=4, ignore_eos=True)
    made = sampling(body, prompts, max_new_tokens=4, sample=False)
    assert (made.temperature, made.min_new_tokens, made.stop_ids) == (0.0, 4, frozenset())
    with pytest.raises(RequestError, match="'min_tokens' asks for at least 5 tokens"):
        sampling(SamplingFields(min_tokens=5), prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {100000: 1.0}),
        ("bad_words_ids", [[5], [6, 100000]]),
        ("suppress_tokens", [5, 100000]),
        ("begin_suppress_tokens", [100000]),
        ("allowed_token_ids", [100000]),
        ("stop_token_ids", [100000]),
        ("eos_token_id", 100000),
        ("forced_eos_token_id", [5, 100000]),
    ],
)
def test_unknown_token_ids_are_refused_by_the_name_of_their_field(
    prompts: PromptTokenizer, name: str, value: Any
) -> None:
    with pytest.raises(RequestError, match="token id 100000 is not in the vocabulary") as caught:
        sampling(SamplingFields.model_validate({name: value}), prompts, max_new_tokens=4)
    assert caught.value.param == name


def test_eos_token_id_replaces_the_models_end_tokens_and_stop_token_ids_add_to_them(
    prompts: PromptTokenizer,
) -> None:
    def stop_ids(**fields: Any) -> frozenset[int]:
        return sampling(SamplingFields(**fields), prompts, max_new_tokens=4).stop_ids

    assert stop_ids(eos_token_id=7) == {7}
    assert stop_ids(eos_token_id=[7, 8], stop_token_ids=[9]) == {7, 8, 9}
    assert stop_ids(eos_token_id=[]) == frozenset()
    assert stop_ids(eos_token_id=7, ignore_eos=True) == frozenset()


def test_a_stop_string_that_is_a_special_token_is_a_stop_id(prompts: PromptTokenizer) -> None:
    body = SamplingFields(stop=["<|im_start|>", "word", "<|im_start|>x", ""], ignore_eos=True)
    assert sampling(body, prompts, max_new_tokens=4).stop_ids == {1}


def test_bad_words_are_spelled_with_and_without_a_space(prompts: PromptTokenizer, tokenizer: Any) -> None:
    made = sampling(SamplingFields(bad_words=["word", " zq", ""]), prompts, max_new_tokens=4)
    assert made.bad_words == ["word", " zq", ""]
    decoded = [tokenizer.decode(ids) for ids in made.bad_words_ids]
    assert decoded == ["word", " word", "zq"], "a space before zq is a token of its own"
    with pytest.raises(RequestError, match="exclude each other"):
        sampling(SamplingFields(bad_words=["x"], bad_words_ids=[[5]]), prompts, max_new_tokens=4)


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
    with pytest.raises(RequestError) as caught:
        max_new_tokens(length, prompts, prompt_tokens=10)
    assert caught.value.param == "max_tokens"
