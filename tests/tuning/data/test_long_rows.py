"""What is left of a row that is too long: it begins with the system's message and a question."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import EncodedExample, Encoder, encode
from runtime.tuning.settings import Encoding
from tests.costs import assert_linear
from tests.tuning.data.test_tokenize import CHATML, FORGETFUL, labelled_texts
from tests.tuning.data.test_turns import TOOLS

SYSTEM, QUESTION = {"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}
HEAD = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    return loaded


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def cut(tokenizer: Any, template: str, *messages: Any, limit: int, **more: Any) -> EncodedExample:
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, Encoding(**more), max_tokens=limit)
    tools = TOOLS if template == CALLS else ()
    encoded = encoder.encode(Example(messages, tools=tools))
    assert all(len(sequence) <= limit for sequence in encoded.sequences)
    return encoded


def length(tokenizer: Any, template: str, *messages: Any) -> int:
    return cut(tokenizer, template, *messages, limit=10**6).tokens


def test_an_answer_too_long_by_itself_keeps_its_prompt_and_loses_its_end(tokenizer: Any) -> None:
    steps = " ".join(f"step{number}" for number in range(200))
    encoded = cut(tokenizer, CHATML, SYSTEM, QUESTION, answer(steps), limit=100)
    assert encoded.outcome == "truncated"
    (row,) = encoded.sequences
    assert len(row) == 100
    (labelled,) = labelled_texts(row, tokenizer)
    assert tokenizer.decode(row.ids) == HEAD + labelled
    assert steps.startswith(labelled)


def test_a_row_whose_prompt_leaves_no_room_is_counted_as_too_long(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    room = length(tokenizer, CHATML, SYSTEM, QUESTION, answer("x")) - 2
    rows = [Example((SYSTEM, QUESTION, answer("long " * 50))), Example((QUESTION, answer("x")))]
    data = encode(rows, Encoder(tokenizer, Encoding(), max_tokens=room), BadRows())
    assert (data.rows, data.too_long, data.unlabelled) == (1, 1, 0)


@pytest.mark.parametrize("steps", [8, 40])
def test_many_steps_after_one_question_are_cut_at_a_step_from_the_end(tokenizer: Any, steps: int) -> None:
    messages = [SYSTEM, QUESTION, answer("earlier"), QUESTION]
    for number in range(steps):
        call = {"type": "function", "function": {"name": "get_order", "arguments": {"id": number}}}
        messages += [{**answer(""), "tool_calls": [call]}, {"role": "tool", "content": f"order {number}"}]
    messages.append(answer("done"))
    limit = length(tokenizer, CALLS, SYSTEM, *messages[3:10]) + 3
    (row,) = cut(tokenizer, CALLS, *messages, limit=limit).sequences
    labelled = labelled_texts(row, tokenizer)
    assert [text.count("<tool_call>") for text in labelled] == [1, 1, 1]
    assert [text[-22:] for text in labelled] == [f"{n}}}}}</tool_call><|im_end|>"[-22:] for n in range(3)]
    assert HEAD in tokenizer.decode(row.ids)


def test_a_long_thought_takes_nothing_from_later_turns(tokenizer: Any) -> None:
    first = answer("<think>" + "hm " * 400 + "</think>Hi Bob")
    messages = [{**QUESTION, "content": "I am Bob"}, first, QUESTION, answer("You are Bob")]
    encoded = cut(tokenizer, FORGETFUL, *messages, limit=150)
    assert encoded.outcome == "truncated"
    thought, later = encoded.sequences
    assert len(thought) == 150
    assert tokenizer.decode(thought.ids).startswith("<|im_start|>user\nI am Bob<|im_end|>")
    assert "I am Bob" in tokenizer.decode(later.ids)
    assert "Hi Bob" in tokenizer.decode(later.ids)
    assert labelled_texts(later, tokenizer) == ["You are Bob<|im_end|>"]


@pytest.mark.parametrize("exchanges", [6, 30])
def test_a_rewriting_template_loses_no_answer_that_fits(tokenizer: Any, exchanges: int) -> None:
    messages = []
    for number in range(exchanges):
        messages += [QUESTION, answer(f"<think>hm</think>answer {number}")]
    limit = length(tokenizer, CHATML, *messages[:8])
    encoded = cut(tokenizer, FORGETFUL, *messages, limit=limit)
    texts = [text for sequence in encoded.sequences for text in labelled_texts(sequence, tokenizer)]
    assert texts == [f"<think>hm</think>answer {number}<|im_end|>" for number in range(exchanges)]
    assert all(len(sequence) > limit / 2 for sequence in encoded.sequences[3:])


def test_plain_text_keeps_its_beginning(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    text = " ".join(map(str, range(200)))
    (row,) = Encoder(tokenizer, Encoding(), max_tokens=20).encode(Example((), text=text)).sequences
    assert text.startswith(tokenizer.decode(row.ids, skip_special_tokens=True).strip())
    assert row.ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("exchanges", [20, 40])
def test_a_split_row_of_a_rewriting_template_keeps_every_answer_with_its_question(
    tokenizer: Any, exchanges: int
) -> None:
    messages = []
    for number in range(exchanges):
        messages += [QUESTION, answer(f"<think>hm</think>answer {number}")]
    limit = length(tokenizer, CHATML, *messages[:8])
    encoded = cut(tokenizer, FORGETFUL, *messages, limit=limit, too_long="split")
    texts = [text for sequence in encoded.sequences for text in labelled_texts(sequence, tokenizer)]
    assert texts == [f"<think>hm</think>answer {number}<|im_end|>" for number in range(exchanges)]
    assert all(
        tokenizer.decode(sequence.ids).startswith("<|im_start|>user") for sequence in encoded.sequences
    )


def test_a_split_row_of_one_long_answer_loses_nothing(tokenizer: Any) -> None:
    messages = [QUESTION, answer("<think>hm</think>no")] * 20 + [
        QUESTION,
        answer(" ".join(map(str, range(90)))),
    ]
    encoded = cut(tokenizer, FORGETFUL, *messages, limit=64, too_long="split")
    joined = "".join(tokenizer.decode(sequence.ids) for sequence in encoded.sequences[-9:])
    assert " ".join(map(str, range(90))) in joined


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split"])
def test_rewritten_rows_that_are_too_long_take_linear_time(tokenizer: Any, too_long: str) -> None:
    def cut_row(exchanges: int) -> None:
        messages = [QUESTION, answer("<think>hm</think>answer")] * exchanges
        cut(tokenizer, FORGETFUL, *messages, limit=64, too_long=too_long)

    assert_linear(cut_row, 30, 240)
