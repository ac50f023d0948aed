"""Which tokens are labelled, for several chat templates; long rows; rows with nothing to train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.errors import ConfigError, DataError
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import TokenizedRow, encode, encode_one, require_rows
from runtime.tuning.settings import Encoding

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "A: {% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}U: {{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
# Rewrites earlier answers, as reasoning models' templates do, and prompts with more than it keeps.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
TURNS = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second answer"},
)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    return loaded


def labelled_texts(row: TokenizedRow, tokenizer: Any) -> list[str]:
    """Return the text of each labelled run."""
    runs: list[list[int]] = []
    before = False
    for token, flag in zip(row.ids.tolist(), row.loss_mask.tolist(), strict=True):
        if flag:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["chatml", "forgetful"])
def test_fault_26_answers_with_their_end_are_labelled_though_pad_is_eos(
    tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_one(Example(TURNS), tokenizer, Encoding())
    assert labelled_texts(row, tokenizer) == ["first answer<|im_end|>", "second answer<|im_end|>"]


def test_thoughts_of_the_last_turn_are_labelled(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    turns = (
        *TURNS[1:2],
        {"role": "assistant", "content": "<think>hm</think>first"},
        TURNS[3],
        {"role": "assistant", "content": "<think>so</think>second"},
    )
    runs = labelled_texts(encode_one(Example(turns), tokenizer, Encoding()), tokenizer)
    assert runs[-1].endswith("so</think>second<|im_end|>")


def test_generation_blocks_of_the_template_are_used(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    row = encode_one(Example(TURNS[1:]), tokenizer, Encoding())
    assert labelled_texts(row, tokenizer) == ["first answer<|im_end|>", "second answer<|im_end|>"]


def test_template_without_end_of_turn_gets_one(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    row = encode_one(Example(TURNS[1:3]), tokenizer, Encoding())
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.loss_mask[-1]
    assert labelled_texts(row, tokenizer)[0].startswith("first answer")


def test_ids_are_the_templates_own(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    own = tokenizer.apply_chat_template(list(TURNS), tokenize=True, return_dict=True)["input_ids"]
    assert encode_one(Example(TURNS), tokenizer, Encoding()).ids.tolist() == own


def test_all_tokens_can_be_labelled(tokenizer: Any) -> None:
    row = encode_one(Example(TURNS), tokenizer, Encoding(loss_on="all"))
    assert row.loss_mask.all()
    assert row.labelled_tokens == len(row) - 1


def test_text_is_labelled_whole_and_ends(tokenizer: Any) -> None:
    row = encode_one(Example((), text="once upon"), tokenizer, Encoding())
    assert row.loss_mask.all()
    assert row.ids[-1] == tokenizer.eos_token_id


def test_messages_without_template_are_a_configuration_error(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_one(Example(TURNS), tokenizer, Encoding())


def test_conversation_that_the_template_refuses_is_a_data_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses a conversation of user, assistant: roles must alternate"):
        encode_one(Example(TURNS[1:3]), tokenizer, Encoding())


def test_fault_24_long_row_loses_old_turns_and_keeps_the_last_answer(tokenizer: Any) -> None:
    whole = encode_one(Example(TURNS), tokenizer, Encoding())
    limit = len(whole) - 5
    encoded = encode([Example(TURNS)], tokenizer, Encoding(), max_tokens=limit, bad_rows=BadRows())
    (row,) = encoded.rows
    assert encoded.truncated == 1
    assert len(row) <= limit
    assert labelled_texts(row, tokenizer) == ["second answer<|im_end|>"]
    assert tokenizer.decode(row.ids[:3]) == tokenizer.decode(whole.ids[:3])  # the system turn stays


def test_fault_24_long_rows_can_be_dropped_or_split(tokenizer: Any) -> None:
    short, long = Example(TURNS[1:3]), Example((TURNS[1], {"role": "assistant", "content": "word " * 200}))
    dropped = encode(
        [short, short, long], tokenizer, Encoding(too_long="drop"), max_tokens=100, bad_rows=BadRows()
    )
    assert (len(dropped.rows), dropped.too_long) == (2, 1)
    parts = encode([short, long], tokenizer, Encoding(too_long="split"), max_tokens=100, bad_rows=BadRows())
    assert len(parts.rows) > 2
    assert parts.truncated == 1
    whole = encode_one(long, tokenizer, Encoding())
    assert np.concatenate([row.ids for row in parts.rows[1:]]).tolist() == whole.ids.tolist()


def test_fault_24_mostly_unlearnable_data_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    encoded = encode([Example(TURNS[1:3])] * 4, tokenizer, Encoding(), max_tokens=64, bad_rows=BadRows())
    with pytest.raises(
        DataError,
        match=r"4 of 4 rows have nothing to train on \(0 longer than 64 tokens, 4 without an answer",
    ):
        require_rows(encoded, 4, max_tokens=64)


def test_conversations_that_the_template_refuses_are_bad_rows(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    examples = [Example(TURNS, origin="row 1"), Example(TURNS[1:3], origin="row 2")]
    with pytest.raises(DataError, match=r"^row 1: the model's chat template refuses .* no system"):
        encode(examples, tokenizer, Encoding(), max_tokens=100, bad_rows=BadRows())
    skipped = BadRows("skip")
    encoded = encode(examples, tokenizer, Encoding(), max_tokens=100, bad_rows=skipped)
    assert (len(encoded.rows), skipped.skipped) == (1, 1)
