"""A conversation becomes token ids and labels, with any model's chat template.

Labels are the assistant's turns with the token that ends each; where they lie is read off the template
itself. Does not know files, tensors or batches. Start at `encode`, then `_spans`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime import models
from runtime.errors import ConfigError, DataError
from runtime.tuning.data.dataset import Example, Message
from runtime.tuning.settings import Encoding, TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 2048
"""Longest row when the user sets none and the model would take more."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One encoded example: ids (T,) int32, and which of them are learnt, (T,) bool."""

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that count in the loss: the first one is never predicted."""
        return int(self.learnt[1:].sum())


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """All rows, and what happened to the others."""

    rows: tuple[TokenizedRow, ...]
    truncated: int = 0
    too_long: int = 0
    """Rows dropped because of their length."""
    unlabelled: int = 0
    """Rows dropped because no token of them would be learnt."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def targets(self) -> int:
        return sum(row.targets for row in self.rows)


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


def longest_row(job: TuningJob) -> int:
    """Return the most tokens of a row: the user's setting, else the model's context, up to MAX_TOKENS."""
    return job.encoding.max_tokens or min(models.context_tokens(models.load_config(job.model)), MAX_TOKENS)


def encode(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", encoding: Encoding, *, max_tokens: int
) -> TokenizedData:
    """Encode `examples`, each to at most `max_tokens`; DataError when more than half teach nothing."""
    rows: list[TokenizedRow] = []
    fates: Counter[RowOutcome] = Counter()
    for example in examples:
        fate, pieces = fit(example, tokenizer, encoding, max_tokens=max_tokens)
        fates[fate] += 1
        rows += pieces
    too_long, unlabelled = fates["too long"], fates["unlabelled"]
    lost = too_long + unlabelled
    if lost * 2 > len(examples) or not rows:
        raise DataError(
            f"{lost} of {len(examples)} rows teach nothing ({too_long} longer than {max_tokens} tokens, "
            f"{unlabelled} without an answer); raise max_length or check the answers"
        )
    return TokenizedData(tuple(rows), fates["truncated"] + fates["split"], too_long, unlabelled)


def fit(
    example: Example, tokenizer: "PreTrainedTokenizerBase", encoding: Encoding, *, max_tokens: int
) -> tuple[RowOutcome, tuple[TokenizedRow, ...]]:
    """Encode `example` as rows of at most `max_tokens`, by the user's choice for longer ones."""
    row = encode_one(example, tokenizer, encoding)
    fate: RowOutcome = "whole"
    pieces = [row]
    if len(row) > max_tokens:
        if encoding.too_long == "drop":
            return "too long", ()
        if encoding.too_long == "split":
            fate, pieces = "split", _split(row, max_tokens)
        else:
            fate, pieces = "truncated", [_truncate(example, tokenizer, encoding, max_tokens=max_tokens)]
    kept = tuple(piece for piece in pieces if piece.targets)
    return (fate if kept else "unlabelled"), kept


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
    text = _render(example.messages, tokenizer)
    ids, offsets = _tokenize(text, tokenizer)
    if encoding.loss_on == "all":
        ended = any(token in _control_ids(tokenizer) for token in ids[-2:])  # a line break may follow it
        ids = ids if ended else [*ids, _eos(tokenizer)]
        return _row(ids, [True] * len(ids))
    if _GENERATION.search(_template(tokenizer)):
        learnt = _marked(example.messages, tokenizer)
    else:
        learnt = _covered(offsets, _spans(example.messages, text, tokenizer))
    return _row(*_end_turns(ids, learnt, tokenizer))


def _row(ids: Sequence[int], learnt: Sequence[bool]) -> TokenizedRow:
    return TokenizedRow(np.asarray(ids, dtype=np.int32), np.asarray(learnt, dtype=np.bool_))


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else str(template["default"])


def _render(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, for_answer: bool = False
) -> str:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_answer)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the model's chat template refuses a conversation of {roles}: {error}") from None
    return str(text)


def _tokenize(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[tuple[int, int]]]:
    """Return ids and the characters (start, end) of `text` that each stands for."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
        )
    # Rows longer than the context are cut by us, so the tokenizer need not warn of them.
    batch: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return batch["input_ids"], batch["offset_mapping"]


def _marked(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Return the tokens inside the template's own {% generation %} blocks."""
    batch: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return [bool(flag) for flag in batch["assistant_masks"]]


def _spans(
    messages: Sequence[Message], text: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, int]]:
    """Return the characters of `text` that the assistant writes, end-of-turn text included.

    A turn begins where the prompt for it ends. Templates that rewrite earlier turns (reasoning models
    cut old thoughts) or prompt with more than they keep are met by looking for the content itself.
    """
    spans: list[tuple[int, int]] = []
    place = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:index], tokenizer, for_answer=True) if index else ""
        if prompt and text.startswith(prompt):
            start = len(prompt)
        else:
            start = text.find(message["content"].strip(), place)
            if start < 0:
                continue
        upto = _render(messages[: index + 1], tokenizer)
        content = text.find(message["content"].strip(), start)
        end = len(upto) if text.startswith(upto) else max(content, start) + len(message["content"].strip())
        spans.append((start, end))
        place = end
    return spans


def _covered(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens touch a span; one that begins before it is learnt too."""
    learnt = [False] * len(offsets)
    for start, end in spans:
        for index, (first, last) in enumerate(offsets):
            if last > start and first < end and last > first:
                learnt[index] = True
    return learnt


def _end_turns(
    ids: list[int], learnt: list[bool], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[bool]]:
    """Let every learnt run end with exactly one end-of-turn token, also when pad and eos are one token."""
    control = _control_ids(tokenizer)
    learnt = list(learnt)
    index = 0
    while index < len(ids):
        if not learnt[index]:
            index += 1
            continue
        end = index
        while end < len(ids) and learnt[end] and not (end > index and ids[end] in control):
            end += 1
        # `end` is the turn's end token, or the first token after the run.
        if end < len(ids) and ids[end] in control:
            learnt[end] = True
            end += 1
        while end < len(ids) and learnt[end]:  # what the template adds after the turn's end
            learnt[end] = False
            end += 1
        index = end
    last = max((place for place, flag in enumerate(learnt) if flag), default=None)
    if last is not None and last == len(ids) - 1 and ids[last] not in control:
        ids, learnt = [*ids, _eos(tokenizer)], [*learnt, True]
    return ids, learnt


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
        starts = [place for place, message in enumerate(turns) if message["role"] == "user" and place]
        if not starts:
            break
        turns = turns[starts[0] :]
        row = encode_one(Example((*system, *turns)), tokenizer, encoding)
    return TokenizedRow(row.ids[-max_tokens:], row.learnt[-max_tokens:])


def _split(row: TokenizedRow, max_tokens: int) -> list[TokenizedRow]:
    cuts = range(0, len(row), max_tokens)
    return [TokenizedRow(row.ids[cut : cut + max_tokens], row.learnt[cut : cut + max_tokens]) for cut in cuts]
