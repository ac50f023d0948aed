"""A conversation becomes token ids and labels, with any model's chat template.

Labelled are the assistant's turns with the token that ends each; where they lie is read off the template
itself. Does not know files, tensors or batches. T tokens. Start at `encode`, then `_assistant_spans`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime import models
from runtime.errors import ConfigError, DataError
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.settings import Encoding, TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 2048
"""Longest row when the user sets none and the model would take more."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One encoded example."""

    ids: NDArray[np.int32]
    """(T,)"""
    loss_mask: NDArray[np.bool_]
    """(T,) which tokens are labelled: the loss is over these alone."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled_tokens(self) -> int:
        """How many tokens the loss is over: the first one is never predicted."""
        return int(self.loss_mask[1:].sum())


class RowCounts:
    """The token counts of a class with `rows`."""

    __slots__ = ()
    rows: tuple[TokenizedRow, ...]

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def labelled_tokens(self) -> int:
        return sum(row.labelled_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenizedData(RowCounts):
    """All rows, and what happened to the others."""

    rows: tuple[TokenizedRow, ...]
    truncated: int = 0
    too_long: int = 0
    """Rows dropped because of their length."""
    unlabelled: int = 0
    """Rows dropped because no token of them is labelled."""


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """The tokenized rows to train on, and those held out (None: no rows are)."""

    train: TokenizedData
    held_out: TokenizedData | None = None

    @property
    def rows(self) -> tuple[TokenizedRow, ...]:
        """The rows of both parts."""
        return (*self.train.rows, *(self.held_out.rows if self.held_out else ()))


RowOutcome = Literal["whole", "truncated", "split", "too long", "unlabelled"]
"""What became of one example; the last two have no rows."""


@dataclass(frozen=True, slots=True)
class EncodedExample(RowCounts):
    """The rows of one example, none when it is dropped."""

    outcome: RowOutcome
    rows: tuple[TokenizedRow, ...] = ()


def longest_row(job: TuningJob) -> int:
    """Return the most tokens of a row: the user's setting, else the model's context, up to MAX_TOKENS."""
    return job.encoding.max_tokens or min(models.context_tokens(models.load_config(job.model)), MAX_TOKENS)


def encode(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    encoding: Encoding,
    *,
    max_tokens: int,
    bad_rows: BadRows,
) -> TokenizedData:
    """Encode `examples`, each to at most `max_tokens`; one that the template refuses is a bad row."""
    rows: list[TokenizedRow] = []
    outcomes: Counter[RowOutcome] = Counter()
    for example in examples:
        with bad_rows.attempt(example.origin):
            encoded = encode_within(example, tokenizer, encoding, max_tokens=max_tokens)
            outcomes[encoded.outcome] += 1
            rows += encoded.rows
    truncated = outcomes["truncated"] + outcomes["split"]
    return TokenizedData(tuple(rows), truncated, outcomes["too long"], outcomes["unlabelled"])


def require_rows(data: TokenizedData, examples: int, *, max_tokens: int) -> None:
    """Raise DataError when more than half of `examples` were dropped from `data`, or all."""
    dropped = data.too_long + data.unlabelled
    if dropped * 2 > examples or not data.rows:
        raise DataError(
            f"{dropped} of {examples} rows have nothing to train on ({data.too_long} longer than "
            f"{max_tokens} tokens, {data.unlabelled} without an answer); "
            "raise max_length or check the answers"
        )


def encode_within(
    example: Example, tokenizer: "PreTrainedTokenizerBase", encoding: Encoding, *, max_tokens: int
) -> EncodedExample:
    """Encode `example` as rows of at most `max_tokens`, with what `encoding.too_long` does to longer ones."""
    row = encode_one(example, tokenizer, encoding)
    outcome: RowOutcome = "whole"
    rows = [row]
    if len(row) > max_tokens:
        if encoding.too_long == "drop":
            return EncodedExample("too long")
        if encoding.too_long == "split":
            outcome, rows = "split", _split(row, max_tokens)
        else:
            outcome, rows = "truncated", [_truncate(example, tokenizer, encoding, max_tokens=max_tokens)]
    labelled = tuple(row for row in rows if row.labelled_tokens)
    return EncodedExample(outcome, labelled) if labelled else EncodedExample("unlabelled")


def encode_one(example: Example, tokenizer: "PreTrainedTokenizerBase", encoding: Encoding) -> TokenizedRow:
    """Encode one example at its full length."""
    if not example.messages:
        ids = [*_tokenize(example.text, tokenizer)[0], _eos(tokenizer)]
        bos = tokenizer.bos_token_id
        if bos is not None and ids[0] != bos and tokenizer("x")["input_ids"][:1] == [bos]:
            ids.insert(0, bos)
        return _row(ids, [True] * len(ids))
    if not tokenizer.chat_template:
        raise ConfigError("no chat template in this model; set chat_template in ModelConfig")
    text = _render(example, tokenizer)
    ids, offsets = _tokenize(text, tokenizer)
    if encoding.loss_on == "all":
        ended = any(token in _control_ids(tokenizer) for token in ids[-2:])  # a line break may follow it
        ids = ids if ended else [*ids, _eos(tokenizer)]
        return _row(ids, [True] * len(ids))
    if _GENERATION.search(_template(tokenizer)):
        mask = _template_mask(example, tokenizer)
    else:
        mask = _span_mask(offsets, _assistant_spans(example, text, tokenizer))
    return _row(*_end_turns(ids, mask, tokenizer))


def _row(ids: Sequence[int], loss_mask: Sequence[bool]) -> TokenizedRow:
    return TokenizedRow(np.asarray(ids, dtype=np.int32), np.asarray(loss_mask, dtype=np.bool_))


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else str(template["default"])


def _render(
    example: Example, tokenizer: "PreTrainedTokenizerBase", *, turns: int | None = None, prompt: bool = False
) -> str:
    """Return the text of the first `turns` messages, with the generation prompt where `prompt` is set."""
    import jinja2

    messages = list(example.messages[:turns])
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=_tools(example), tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the model's chat template refuses a conversation of {roles}: {error}") from None
    return str(text)


def _tools(example: Example) -> Any:
    """Return the tools of `example` as templates know them: None where there are none."""
    return list(example.tools) or None


def _tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and the character range (start, end) of `text` that each stands for."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
        )
    # Rows longer than the context are cut here, so the tokenizer need not warn of them.
    batch: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return batch["input_ids"], batch["offset_mapping"]


def _template_mask(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Return which tokens are inside the template's own {% generation %} blocks."""
    batch: Any = tokenizer.apply_chat_template(
        list(example.messages),
        tools=_tools(example),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return [bool(flag) for flag in batch["assistant_masks"]]


def _assistant_spans(
    example: Example, text: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    """Return the character ranges of `text` that the assistant writes, end-of-turn text included.

    A turn begins where the prompt for it ends. Where a template rewrites earlier turns (reasoning models
    cut old thoughts) or prompts with more than it keeps, the content itself is looked for.
    """
    spans: list[tuple[int, int]] = []
    previous_end = 0
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(example, tokenizer, turns=index, prompt=True) if index else ""
        if prompt and text.startswith(prompt):
            start = len(prompt)
        else:
            start = text.find(message["content"].strip(), previous_end)
            if start < 0:
                continue
        prefix = _render(example, tokenizer, turns=index + 1)
        content = text.find(message["content"].strip(), start)
        end = (
            len(prefix) if text.startswith(prefix) else max(content, start) + len(message["content"].strip())
        )
        spans.append((start, end))
        previous_end = end
    return spans


def _span_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens touch a span; one that begins before it is labelled too."""
    mask = [False] * len(offsets)
    for start, end in spans:
        for index, (first, last) in enumerate(offsets):
            if last > start and first < end and last > first:
                mask[index] = True
    return mask


def _end_turns(
    ids: list[int], loss_mask: list[bool], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[bool]]:
    """End every labelled run with exactly one end-of-turn token, also when pad and eos are one token."""
    control = _control_ids(tokenizer)
    mask = list(loss_mask)
    index = 0
    while index < len(ids):
        if not mask[index]:
            index += 1
            continue
        end = index
        while end < len(ids) and mask[end] and not (end > index and ids[end] in control):
            end += 1
        # `end` is the turn's end token, or the first token after the run.
        if end < len(ids) and ids[end] in control:
            mask[end] = True
            end += 1
        while end < len(ids) and mask[end]:  # what the template adds after the turn's end
            mask[end] = False
            end += 1
        index = end
    last = max((number for number, labelled in enumerate(mask) if labelled), default=None)
    if last is not None and last == len(ids) - 1 and ids[last] not in control:
        ids, mask = [*ids, _eos(tokenizer)], [*mask, True]
    return ids, mask


def _control_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    return frozenset(special | set(tokenizer.all_special_ids))


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ConfigError("the tokenizer has no end-of-sequence token, so an answer could never end")
    return tokenizer.eos_token_id


def _truncate(
    example: Example, tokenizer: "PreTrainedTokenizerBase", encoding: Encoding, *, max_tokens: int
) -> TokenizedRow:
    """Drop the oldest turns (not the system's) until the row fits; then cut the front of what is left."""
    system = [message for message in example.messages[:1] if message["role"] == "system"]
    turns = list(example.messages[len(system) :])
    row = encode_one(example, tokenizer, encoding)
    while len(row) > max_tokens:
        later = next((i for i, message in enumerate(turns) if message["role"] == "user" and i), None)
        if later is None:
            break
        turns = turns[later:]
        row = encode_one(replace(example, messages=(*system, *turns)), tokenizer, encoding)
    return TokenizedRow(row.ids[-max_tokens:], row.loss_mask[-max_tokens:])


def _split(row: TokenizedRow, max_tokens: int) -> list[TokenizedRow]:
    slices = [slice(start, start + max_tokens) for start in range(0, len(row), max_tokens)]
    return [TokenizedRow(row.ids[part], row.loss_mask[part]) for part in slices]
