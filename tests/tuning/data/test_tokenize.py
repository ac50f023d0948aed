"""Ids and masks of whole rows, of long ones, of plain text; which rows teach nothing or are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.errors import ConfigError, DataError
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import Encoder, TokenizedSequence, encode, require_rows
from runtime.tuning.settings import Encoding
from tests.serving.conftest import make_sentencepiece

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Rewrites earlier answers, as reasoning models' templates do."""
TURNS = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second answer"},
)
THINKING = (
    TURNS[1],
    {"role": "assistant", "content": "<think>hm</think>first"},
    TURNS[3],
    {"role": "assistant", "content": "<think>so</think>second"},
)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    loaded.chat_template = CHATML
    return loaded


def encoder(tokenizer: Any, max_tokens: int = 2048, **settings: Any) -> Encoder:
    return Encoder(tokenizer, Encoding(**settings), max_tokens=max_tokens)


def whole(tokenizer: Any, example: Example, **settings: Any) -> list[TokenizedSequence]:
    encoded = encoder(tokenizer, **settings).encode(example)
    assert encoded.outcome == "whole"
    return list(encoded.sequences)


def labelled_texts(row: TokenizedSequence, tokenizer: Any) -> list[str]:
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


def test_fault_26_answers_with_their_end_are_labelled_though_pad_is_eos(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (row,) = whole(tokenizer, Example(TURNS))
    assert labelled_texts(row, tokenizer) == ["first answer<|im_end|>", "second answer<|im_end|>"]


def test_rewritten_turns_are_sequences_of_their_row(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    data = encode([Example(THINKING), Example(TURNS)], encoder(tokenizer), BadRows())
    assert (data.rows, data.sequences_per_row) == (2, (2, 1))
    assert [labelled_texts(sequence, tokenizer) for sequence in data.sequences] == [
        ["<think>hm</think>first<|im_end|>"],
        ["<think>so</think>second<|im_end|>"],
        ["first answer<|im_end|>", "second answer<|im_end|>"],
    ]
    assert "<think>hm" not in tokenizer.decode(data.sequences[1].ids)


def test_ids_are_the_templates_own_up_to_the_last_answer(tokenizer: Any) -> None:
    own = tokenizer.apply_chat_template(list(TURNS), tokenize=True, return_dict=True)["input_ids"]
    (row,) = whole(tokenizer, Example(TURNS))
    assert row.ids.tolist() == own[: len(row)]
    assert tokenizer.decode(own[len(row) :]) == "\n"


def test_token_over_the_end_of_the_prompt_is_encoded_as_the_server_encodes_it(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN.replace("assistant: ", "assistant:\n").replace(": {{", ":\n{{")
    tokenizer.add_tokens(["\n\n"])
    (row,) = whole(tokenizer, Example((TURNS[1], {"role": "assistant", "content": "\nanswer"})))
    prompt = tokenizer.encode("### user:\none?\n### assistant:\n", add_special_tokens=False)
    assert row.ids.tolist()[: len(prompt)] == prompt
    assert not row.loss_mask[: len(prompt)].any()
    assert labelled_texts(row, tokenizer) == ["\nanswer<|im_end|>"]


@pytest.mark.parametrize("strips", [True, False])
def test_sentencepiece_answers_are_labelled_whole(strips: bool) -> None:
    pieces = make_sentencepiece(strips=strips)
    pieces.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}:{% else %}"
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    turns = (
        {"role": "user", "content": "a word"},
        {"role": "assistant", "content": "the word is 日"},
    )
    (row,) = whole(pieces, Example(turns))
    assert pieces.decode(row.ids).replace("> ", ">") == "<|user|>a word:the word is 日</s>"
    assert labelled_texts(row, pieces) == ["the word is 日</s>"]


def test_template_without_end_of_turn_gets_the_tokenizers(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    data = encode([Example(TURNS[1:])], encoder(tokenizer), BadRows())
    assert [labelled_texts(sequence, tokenizer) for sequence in data.sequences] == [
        ["first answer<|im_end|>"], ["second answer<|im_end|>"],
    ]  # fmt: skip


def test_untrained_turns_are_not_labelled(tokenizer: Any) -> None:
    (row,) = whole(tokenizer, Example(TURNS, untrained=frozenset({2})))
    assert labelled_texts(row, tokenizer) == ["second answer<|im_end|>"]
    none = encoder(tokenizer).encode(Example(TURNS, untrained=frozenset({2, 4})))
    assert (none.outcome, none.sequences) == ("unlabelled", ())


def test_all_tokens_can_be_labelled(tokenizer: Any) -> None:
    (row,) = whole(tokenizer, Example(TURNS), loss_on="all")
    assert row.loss_mask.all()
    assert row.labelled_tokens == len(row) - 1


def test_text_is_labelled_whole_and_ends(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    (row,) = whole(tokenizer, Example((), text="once upon"))
    assert row.loss_mask.all()
    assert row.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
def test_text_that_begins_and_ends_as_texts_do_gets_no_second_token(tokenizer: Any, after: str) -> None:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    (row,) = whole(tokenizer, Example((), text=f"{bos}once upon{eos}{after}"))
    assert tokenizer.decode(row.ids) == f"{bos}once upon{eos}{after}"


def test_messages_without_template_are_a_configuration_error(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        whole(tokenizer, Example(TURNS))


def test_fault_24_long_row_loses_old_turns_and_keeps_the_last_answer(tokenizer: Any) -> None:
    (full,) = whole(tokenizer, Example(TURNS))
    encoded = encoder(tokenizer, len(full) - 5).encode(Example(TURNS))
    assert (encoded.outcome, encoded.full_tokens) == ("truncated", len(full))
    (row,) = encoded.sequences
    assert len(row) <= len(full) - 5
    assert labelled_texts(row, tokenizer) == ["second answer<|im_end|>"]
    assert tokenizer.decode(row.ids[:3]) == tokenizer.decode(full.ids[:3])  # the system turn stays


@pytest.mark.parametrize("template", [CHATML, FORGETFUL, PLAIN])
@pytest.mark.parametrize("exchanges", [5, 40])
def test_long_row_keeps_as_many_turns_as_fit(tokenizer: Any, template: str, exchanges: int) -> None:
    tokenizer.chat_template = template
    turns = [TURNS[0]]
    for number in range(exchanges):
        turns += [
            {"role": "user", "content": f"question {number}?"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    untrained = frozenset({len(turns) - 3})

    def last(first: int) -> int:
        kept = (turns[0], *turns[first:])
        return max(map(len, whole(tokenizer, Example(kept, untrained=frozenset({len(kept) - 3})))))

    limit = last(len(turns) - 6)  # three exchanges
    encoded = encoder(tokenizer, limit).encode(Example(tuple(turns), untrained=untrained))
    assert encoded.outcome == "truncated"
    texts = [text for sequence in encoded.sequences for text in labelled_texts(sequence, tokenizer)]
    kept = [exchanges - 3, exchanges - 1]
    if template == PLAIN:  # each turn is a sequence of its own, and those of the older ones fit
        kept[:0] = range(exchanges - 3)
    assert texts == [f"answer {number}<|im_end|>" for number in kept]
    assert all(len(sequence) <= limit for sequence in encoded.sequences)
    assert all("be kind" in tokenizer.decode(sequence.ids) for sequence in encoded.sequences)


def test_fault_24_long_rows_can_be_dropped_or_split(tokenizer: Any) -> None:
    short, long = Example(TURNS[1:3]), Example((TURNS[1], {"role": "assistant", "content": "word " * 200}))
    dropped = encode([short, short, long], encoder(tokenizer, 100, too_long="drop"), BadRows())
    assert (dropped.rows, dropped.too_long) == (2, 1)
    parts = encode([short, long], encoder(tokenizer, 100, too_long="split"), BadRows())
    assert parts.rows == 2
    assert parts.sequences_per_row == (1, len(parts.sequences) - 1)
    assert parts.truncated == 1
    (full,) = whole(tokenizer, long)
    assert np.concatenate([part.ids for part in parts.sequences[1:]]).tolist() == full.ids.tolist()


def test_fault_24_mostly_unlearnable_data_is_an_error(tokenizer: Any) -> None:
    example = Example(TURNS[1:3], untrained=frozenset({1}))
    encoded = encode([example] * 4, encoder(tokenizer, 64), BadRows())
    with pytest.raises(
        DataError,
        match=r"4 of 4 rows have nothing to train on \(0 longer than 64 tokens, 4 without an answer",
    ):
        require_rows(encoded, 4, max_tokens=64)


def test_conversations_that_the_template_refuses_are_bad_rows(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    examples = [Example(TURNS, origin="row 1"), Example(TURNS[1:3], origin="row 2")]
    with pytest.raises(DataError, match=r"^row 1: the model's chat template refuses .* no system"):
        encode(examples, encoder(tokenizer), BadRows())
    skipped = BadRows("skip")
    assert encode(examples, encoder(tokenizer), skipped).rows == 1
    assert skipped.skipped == 1
