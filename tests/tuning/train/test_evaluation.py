"""Sample questions, and the model's answers to them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.tuning.data.example import Example
from runtime.tuning.settings import TuningJob
from runtime.tuning.train.evaluation import NEW_TOKENS, evaluate, question_prompt
from tests.tuning.data.template_families import CHATML, FAMILIES
from tests.tuning.train.test_trainer import training_setup


def conversation(*roles: str) -> Example:
    return Example(tuple({"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)))


def test_evaluation_without_held_out_rows_has_answers_and_no_loss(
    make_job: Callable[..., TuningJob],
) -> None:
    setup = training_setup(make_job(training={"max_steps": 1}))
    questions = [conversation("user", "assistant"), conversation("system", "user", "assistant")]
    result = evaluate(setup, questions)
    assert result.loss is None
    assert len(result.answers) == 2


def test_a_question_is_asked_as_the_server_asks_it() -> None:
    tokenizer: Any = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls or '' }}")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    asked = ({"role": "user", "content": "a"}, calling, {"role": "tool", "content": "5"})
    prompt = question_prompt(tokenizer, Example((*asked, {"role": "assistant", "content": "b"})))
    served = chat_template.render(
        tokenizer, [asked[0], {**calling, "content": ""}, asked[2]], TemplateOptions()
    )
    assert prompt == served
    assert "None" not in prompt


def test_answers_that_reach_the_limit_are_told_where_the_datas_are_short(
    make_job: Callable[..., TuningJob], caplog: pytest.LogCaptureFixture
) -> None:
    """The end token is made certain, then impossible; meanwhile the log says how far the answers are."""
    caplog.set_level("INFO")
    setup = training_setup(make_job(training={"max_steps": 1}))
    seconds = itertools.count()
    setup.callbacks.reporter.clock = lambda: next(seconds)
    long = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 200})
    questions = [conversation("user", "assistant"), Example(long)]
    end, bias = setup.tokenizer.eos_token_id, torch.zeros(setup.model.config.vocab_size)
    hook = setup.model.get_output_embeddings().register_forward_hook(lambda *call: call[2] + bias)
    ended = []
    for value in (1e4, -1e4):
        bias[end] = value
        ended.append([answer.ended for answer in evaluate(setup, questions).answers])
    hook.remove()
    assert ended == [[True, None], [False, None]]
    lines = [record.getMessage() for record in caplog.records if "answering" in record.getMessage()]
    assert len(lines) > 2
    assert all(line.endswith(f"/{NEW_TOKENS}") for line in lines)
    assert setup.throughput.activity is None
