"""Examples become token ids and labels.

Labelled are the assistant's turns with the token that ends each (turns.py), or every token. Does not know
files, templates, tensors or batches. T tokens. Start at `encode`, then `Encoder.encode`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime import models
from runtime.errors import ConfigError, DataError
from runtime.tuning.data.answers import AnswerReader, dialogue
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.long_rows import exchanges, with_turns, without_last_steps, without_oldest
from runtime.tuning.data.turns import (
    LONG,
    TextSequence,
    is_one_sequence,
    labelled_turns,
    last_sequence,
    sequences,
)
from runtime.tuning.settings import Encoding, TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 2048
"""Longest sequence when the user sets none and the model would take more."""


@dataclass(frozen=True, slots=True)
class TokenizedSequence:
    """What the model is trained on at once: an example, or a part of one."""

    ids: NDArray[np.int32]
    """(T,)"""
    loss_mask: NDArray[np.bool_]
    """(T,) which tokens are labelled: the loss is over these alone."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "TokenizedSequence":
        return TokenizedSequence(self.ids[part], self.loss_mask[part])

    @property
    def labelled_tokens(self) -> int:
        """How many tokens the loss is over: the first one is never predicted."""
        return int(self.loss_mask[1:].sum())


class SequenceCounts:
    """The token counts of a class with `sequences`."""

    __slots__ = ()
    sequences: tuple[TokenizedSequence, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def labelled_tokens(self) -> int:
        return sum(sequence.labelled_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class TokenizedData(SequenceCounts):
    """All rows as sequences, and what happened to the others."""

    sequences: tuple[TokenizedSequence, ...]
    sequences_per_row: tuple[int, ...] = ()
    """How many of them, in their order, each row is; () where every one is a row. More than one where a row
    was split, or where the template rewrites earlier turns."""
    truncated: int = 0
    too_long: int = 0
    """Rows dropped because of their length."""
    unlabelled: int = 0
    """Rows dropped because no token of them is labelled."""

    @property
    def rows(self) -> int:
        return len(self.sequences_per_row or self.sequences)


@dataclass(frozen=True, slots=True)
class TokenizedSplit:
    """The tokenized rows to train on, and those held out (None: no rows are)."""

    train: TokenizedData
    held_out: TokenizedData | None = None

    @property
    def sequences(self) -> tuple[TokenizedSequence, ...]:
        """The sequences of both parts."""
        return (*self.train.sequences, *(self.held_out.sequences if self.held_out else ()))


RowOutcome = Literal["whole", "truncated", "split", "too long", "unlabelled"]
"""What became of one example; the last two have no sequences."""


@dataclass(frozen=True, slots=True)
class EncodedExample(SequenceCounts):
    """The sequences of one example, none when it is dropped."""

    outcome: RowOutcome
    full_tokens: int
    """Before anything was cut: of all its sequences, or of the longest where the others were not encoded."""
    sequences: tuple[TokenizedSequence, ...] = ()


def longest_row(job: TuningJob) -> int:
    """Return the most tokens of a row: the user's setting, else the model's context, up to MAX_TOKENS."""
    return job.encoding.max_tokens or min(models.context_tokens(models.load_config(job.model)), MAX_TOKENS)


def encoder(job: TuningJob, tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
    """Return what encodes the rows of `job`."""
    end_ids = models.stated_end_ids(job.model)
    return Encoder(tokenizer, job.encoding, max_tokens=longest_row(job), end_ids=end_ids)


def is_models_own(kind: type) -> bool:
    """Return whether a tokenizer's class is code that the model brings (trust_remote_code)."""
    return kind.__module__.startswith("transformers_modules")


def results(examples: Iterable[Example], encoder: "Encoder") -> Iterator[EncodedExample | DataError]:
    """Yield what each of `examples` becomes, or why the template refuses it or leaves labels undecided."""
    for example in examples:
        try:
            yield encoder.encode(example)
        except DataError as error:
            yield error


def attempted(
    examples: Iterable[Example], results: Iterable[EncodedExample | DataError], bad_rows: BadRows
) -> Iterator[tuple[Example, EncodedExample | None]]:
    """Yield each example with its result, None for a row that is bad and left out."""
    for example, result in zip(examples, results, strict=True):
        with bad_rows.attempt(example.origin):
            if not isinstance(result, EncodedExample):
                raise result
        yield example, result if isinstance(result, EncodedExample) else None


def encode(examples: Sequence[Example], encoder: "Encoder", bad_rows: BadRows) -> TokenizedData:
    """Encode `examples`, without those that are bad."""
    done = attempted(examples, results(examples, encoder), bad_rows)
    return collected(result for _, result in done if result is not None)


def collected(rows: Iterable[EncodedExample]) -> TokenizedData:
    """Return the sequences of all rows, and what happened to the others."""
    sequences: list[TokenizedSequence] = []
    per_row: list[int] = []
    outcomes: Counter[RowOutcome] = Counter()
    for row in rows:
        outcomes[row.outcome] += 1
        if row.sequences:
            sequences += row.sequences
            per_row.append(len(row.sequences))
    return TokenizedData(
        tuple(sequences),
        tuple(per_row),
        truncated=outcomes["truncated"] + outcomes["split"],
        too_long=outcomes["too long"],
        unlabelled=outcomes["unlabelled"],
    )


def require_rows(data: TokenizedData, examples: int, *, max_tokens: int) -> None:
    """Raise DataError when more than half of `examples` were dropped from `data`, or all."""
    dropped = data.too_long + data.unlabelled
    if dropped * 2 > examples or not data.rows:
        raise DataError(
            f"{dropped} of {examples} rows have nothing to train on ({data.too_long} longer than "
            f"{max_tokens} tokens, {data.unlabelled} without an answer); "
            "raise max_length or check the answers"
        )


class Encoder:
    """Encodes examples for one model, with what `encoding` says of labels and of long rows."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        encoding: Encoding,
        *,
        max_tokens: int,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """A sequence has at most `max_tokens`; `end_ids` are those that the server stops at (models.py)."""
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
            )
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._encoding = encoding
        self.end_ids = end_ids | models.end_ids(tokenizer.eos_token_id)
        self._answers: AnswerReader | None = None

    def encode(self, example: Example) -> EncodedExample:
        """Return the sequences of `example`, each of at most `max_tokens`.

        Raises DataError for what the template refuses or leaves undecided, ConfigError without a template.
        """
        too_long = self._encoding.too_long
        if len(example.messages) >= LONG and labelled_turns(example):
            tokens = self._longest(example)
            if tokens > self.max_tokens:
                return self._long(example, tokens)
        parts = self._parts(example)
        tokens = sum(len(sequence) for _, sequence in parts)
        if all(self._is_short(sequence) for _, sequence in parts):
            return _labelled("whole", (sequence for _, sequence in parts), tokens)
        if too_long == "drop":
            return EncodedExample("too long", tokens)
        if too_long == "truncate":
            cut = [part if not self._is_short(sequence) else sequence for part, sequence in parts]
            return self._truncated(cut, tokens)
        return self._split((sequence for _, sequence in parts), tokens)

    def _long(self, example: Example, tokens: int) -> EncodedExample:
        """Return a row of LONG messages or more that is too long, without encoding its sequences in full.

        Split, each part of it keeps the turns before it that fit.
        """
        if self._encoding.too_long == "drop":
            return EncodedExample("too long", tokens)
        parts = self._parts_of_long(example)
        if self._encoding.too_long == "truncate":
            return self._truncated(parts, tokens)
        if parts != [example]:
            parts = [without_oldest(part, self._fits) for part in parts]
        return self._split((sequence for part in parts for _, sequence in self._parts(part)), tokens)

    def _split(self, sequences: Iterable[TokenizedSequence], tokens: int) -> EncodedExample:
        slices = [
            sequence[start : start + self.max_tokens]
            for sequence in sequences
            for start in range(0, len(sequence), self.max_tokens)
        ]
        return _labelled("split", slices, tokens)

    def _truncated(self, parts: Iterable[Example | TokenizedSequence], tokens: int) -> EncodedExample:
        """Return the row of these `parts`, of which examples are to be cut and sequences are not."""
        sequences = [
            sequence
            for part in parts
            for sequence in (self._cut(part) if isinstance(part, Example) else [part])
        ]
        # There is a label somewhere; where none is left, no prompt left room for one.
        return _labelled("truncated", sequences, tokens, otherwise="too long")

    def _cut(self, example: Example) -> list[TokenizedSequence]:
        """Return the sequences of `example` without its oldest turns, then its last ones, as far as it fits.

        One answer that is too long by itself loses its end. What has no room for a label is none.
        """
        kept = without_oldest(example, self._fits)
        if not self._fits(kept):
            kept = without_last_steps(kept, self._fits)
        return [sequence[: self.max_tokens] for _, sequence in self._parts(kept)]

    def _parts_of_long(self, example: Example) -> list[Example]:
        """Return the parts of a conversation of many messages that are cut each by itself.

        Where the template rewrites turns, they are its exchanges: to encode the sequences at their full
        length would take quadratic time.
        """
        if self._encoding.loss_on == "all" or is_one_sequence(example, self._reader()):
            return [example]
        return [*exchanges(example)]

    def _is_short(self, sequence: TokenizedSequence) -> bool:
        return len(sequence) <= self.max_tokens

    def _fits(self, example: Example) -> bool:
        return self._longest(example) <= self.max_tokens

    def _longest(self, example: Example) -> int:
        """Return the tokens of the longest sequence: that of the last turn."""
        if self._encoding.loss_on == "all" or not labelled_turns(example):
            return max((len(sequence) for _, sequence in self._parts(example)), default=0)
        return len(self._tokenized(last_sequence(example, self._reader())))

    def _parts(self, example: Example) -> list[tuple[Example, TokenizedSequence]]:
        """Return the sequences of `example` at their full length, each with its part of the row."""
        if not example.messages or self._encoding.loss_on == "all":
            return [(example, self._all(example))]
        return [
            (with_turns(example, sequence.turns), self._tokenized(sequence))
            for sequence in sequences(example, self._reader())
        ]

    def _all(self, example: Example) -> TokenizedSequence:
        """Return the ids of plain text, or of a conversation, all labelled."""
        if not example.messages:
            return _all_labelled(self._with_ends(self._tokenize(example.text)[0]))
        ids = self._tokenize(self._reader().text(dialogue(example.messages, example.tools)))[0]
        ended = any(token in self._control_ids for token in ids[-2:])  # a line break may follow it
        return _all_labelled(ids if ended else [*ids, self._eos()])

    def _with_ends(self, ids: list[int]) -> list[int]:
        """Return the ids of plain text with the tokens that begin and end a text, where it has them not."""
        bos = self.tokenizer.bos_token_id
        begun = ids[:1] == [bos] or (ids[1:2] == [bos] and not str(self.tokenizer.decode(ids[:1])).strip())
        if bos is not None and not begun and self.tokenizer("x")["input_ids"][:1] == [bos]:
            ids = [bos, *ids]
        last = len(ids) - 1
        while last > 0 and not str(self.tokenizer.decode([ids[last]])).strip():
            last -= 1
        return ids if last >= 0 and ids[last] in self.end_ids else [*ids, self._eos()]

    def _tokenized(self, sequence: TextSequence) -> TokenizedSequence:
        """Return the ids of a text, labelled where its pieces are."""
        runs = [
            ("".join(piece.text for piece in pieces), labelled)
            for labelled, pieces in groupby(sequence.pieces, key=lambda piece: piece.labelled)
        ]
        ids, ranges = self._tokenize("".join(text for text, _ in runs))
        mask, crossed = _mask(runs, ranges)
        if crossed:
            ids, mask = self._apart(runs, ids, mask)
        if not sequence.closed:
            ids, mask = [*ids, self._eos()], np.append(mask, True)
        return TokenizedSequence(np.asarray(ids, dtype=np.int32), mask)

    def _apart(
        self, runs: Sequence[tuple[str, bool]], ids: list[int], mask: NDArray[np.bool_]
    ) -> tuple[list[int], NDArray[np.bool_]]:
        """Return ids and labels of a text in which a token begins in the prompt and ends in the answer.

        The server encodes the prompt alone, so each run is; where that would be another text, which it is
        for a tokenizer that begins every text with a space, such tokens are labelled instead.
        """
        parts = [(self._tokenize(text)[0], labelled) for text, labelled in runs]
        joined = [token for part, _ in parts for token in part]
        if self.tokenizer.decode(joined) != self.tokenizer.decode(ids):
            return ids, mask
        flags = [np.full(len(part), labelled, dtype=np.bool_) for part, labelled in parts]
        return joined, np.concatenate(flags)

    def _reader(self) -> AnswerReader:
        """Return what reads the template, made for the first conversation: plain text needs no template."""
        if self._answers is None:
            self._answers = AnswerReader(self.tokenizer, self.end_ids)
        return self._answers

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and the character range (start, end) of `text` that each stands for."""
        # Rows longer than the context are cut here, so the tokenizer need not warn of them.
        batch: Any = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return batch["input_ids"], batch["offset_mapping"]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    def _eos(self) -> int:
        if not isinstance(self.tokenizer.eos_token_id, int):
            raise ConfigError("the tokenizer has no end-of-sequence token, so an answer could never end")
        return self.tokenizer.eos_token_id


def _labelled(
    outcome: RowOutcome,
    parts: Iterable[TokenizedSequence],
    tokens: int,
    otherwise: RowOutcome = "unlabelled",
) -> EncodedExample:
    """Return those of `parts` in which something is labelled; `otherwise` is what a row without any is."""
    labelled = tuple(part for part in parts if part.labelled_tokens)
    return EncodedExample(outcome if labelled else otherwise, tokens, labelled)


def _all_labelled(ids: Sequence[int]) -> TokenizedSequence:
    return TokenizedSequence(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_))


def _mask(
    runs: Sequence[tuple[str, bool]], ranges: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.bool_], bool]:
    """Return which tokens, of these character ranges, lie in labelled runs, and whether some lie in two runs.

    Such a token counts as one of the later run.
    """
    offsets = np.fromiter(chain.from_iterable(ranges), np.int64, 2 * len(ranges)).reshape(-1, 2)
    borders = np.cumsum([len(text) for text, _ in runs])[:-1]
    first = np.searchsorted(offsets[:, 1], borders, side="right")  # of each run but the first
    counts = np.diff(first, prepend=0, append=len(ranges))
    within = first < len(ranges)
    crossed = offsets[first[within], 0] < borders[within]
    return np.repeat([labelled for _, labelled in runs], counts), bool(crossed.any())
