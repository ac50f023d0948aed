"""A few rows exactly as the model would see them, and what becomes of all the others.

The job's own data, tokenizer and encoding, but no weights. Does not know how rows are drawn on a screen.
Start at `preview`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from runtime import models, oci
from runtime.oci.access import DEFAULT
from runtime.tuning.data import dataset, download, formats, tokenize
from runtime.tuning.data.dataset import Dataset, Example, split
from runtime.tuning.data.tokenize import RowOutcome, TokenizedRow, longest_row
from runtime.tuning.settings import TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED_ROWS = 1000
"""Rows that are encoded for the counts: enough for shares to the percent, done in a second or two."""


@dataclass(frozen=True, slots=True)
class TextRun:
    """Neighbouring tokens that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One example and the rows it becomes."""

    origin: str
    """File and row."""
    fate: RowOutcome
    full_tokens: int
    """Its length before anything was cut."""
    tokens: int
    trained: int
    rows: tuple[tuple[TextRun, ...], ...]
    """More than one after a split, none when it is dropped."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What `runtime tune` would train on."""

    shown: tuple[PreviewRow, ...]
    data: Dataset
    train_rows: int
    held_out_rows: int
    max_tokens: int
    counted: int
    """Training rows that the counts below are of, from the first."""
    fates: Counter[RowOutcome]
    tokens: int
    trained: int

    @property
    def dropped(self) -> int:
        """Rows of `counted` that teach nothing."""
        return self.fates["too long"] + self.fates["unlabelled"]


def preview(job: TuningJob, *, count: int, access: oci.Access = DEFAULT) -> Preview:
    """Return the first `count` training rows of `job` as they are encoded, and counts over many."""
    download.fetch(job.data, token=job.hub_token, access=access)
    data = dataset.load(job.data, formats.targets(job.data))
    train, held_out = split(data.examples, job.data)
    tokenizer, limit = models.load_tokenizer(job.model), longest_row(job)
    examined = train[: max(count, COUNTED_ROWS)]
    encoded = [tokenize.fit(example, tokenizer, job.encoding, max_tokens=limit) for example in examined]
    rows = [row for _, pieces in encoded for row in pieces]
    return Preview(
        shown=tuple(
            _show(example, result, tokenizer, job)
            for example, result in zip(examined[:count], encoded, strict=False)
        ),
        data=data,
        train_rows=len(train),
        held_out_rows=len(held_out),
        max_tokens=limit,
        counted=len(examined),
        fates=Counter(fate for fate, _ in encoded),
        tokens=sum(len(row) for row in rows),
        trained=sum(row.targets for row in rows),
    )


def _show(
    example: Example,
    encoded: tuple[RowOutcome, Sequence[TokenizedRow]],
    tokenizer: "PreTrainedTokenizerBase",
    job: TuningJob,
) -> PreviewRow:
    fate, rows = encoded
    return PreviewRow(
        origin=example.origin,
        fate=fate,
        full_tokens=len(tokenize.encode_one(example, tokenizer, job.encoding)),
        tokens=sum(len(row) for row in rows),
        trained=sum(row.targets for row in rows),
        rows=tuple(runs(row, tokenizer) for row in rows),
    )


def runs(row: TokenizedRow, tokenizer: "PreTrainedTokenizerBase") -> tuple[TextRun, ...]:
    """Return the text of `row`, special tokens included, cut where training on it begins or ends."""
    found: list[TextRun] = []
    ids = row.ids.tolist()
    end, before = 0, ""
    for trained, flags in groupby(row.learnt.tolist()):
        start, end = end, end + len(list(flags))
        # Sentencepiece drops the space before a text's first token: a run's text is what it adds.
        upto = _text(ids[:end], tokenizer)
        text = upto[len(before) :] if upto.startswith(before) else _text(ids[start:end], tokenizer)
        found.append(TextRun(text, trained))
        before = upto
    return tuple(found)


def _text(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
