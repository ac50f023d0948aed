"""A few rows exactly as the model would see them, and the outcome of encoding the others.

Uses the job's own data, tokenizer and encoding, but no weights. Does not know how rows are drawn on a
screen. Start at `preview`.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from runtime import models, oci
from runtime.oci.access import DEFAULT
from runtime.tuning.data import dataset, download, folder, tokenize
from runtime.tuning.data.dataset import DataSummary, divide
from runtime.tuning.data.encoded import EncodedData, EncodedRow, EncodingFacts
from runtime.tuning.data.encoding import DataEncoder
from runtime.tuning.data.rendered_fields import RenderedFields
from runtime.tuning.data.tokenize import RowOutcome, TokenizedSequence, attempted
from runtime.tuning.settings import TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED_ROWS = 1000
"""Rows that are encoded for the counts: enough for percentages, done in a second or two."""


@dataclass(frozen=True, slots=True)
class TextRun:
    """Neighbouring tokens that are all labelled, or all not."""

    text: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class PreviewExample:
    """One example and the sequences it becomes."""

    origin: str
    """File and row."""
    outcome: RowOutcome
    full_tokens: int
    """Its length before anything was cut."""
    tokens: int
    labelled_tokens: int
    sequences: tuple[tuple[TextRun, ...], ...]
    """More than one after a split or where the template rewrites earlier turns, none when it is dropped."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What `runtime tune` would train on."""

    examples: tuple[PreviewExample, ...]
    data: DataSummary
    train_rows: int
    held_out_rows: int
    max_tokens: int
    counted: int
    """Training rows that the counts below are of, from the first."""
    outcomes: Counter[RowOutcome]
    tokens: int
    labelled_tokens: int
    sequences: int
    """What the rows of `counted` became: a row is more than one where it is split, or where the template
    rewrites its earlier turns."""

    @property
    def dropped(self) -> int:
        """Rows of `counted` that are too long or have no labelled token."""
        return self.outcomes["too long"] + self.outcomes["unlabelled"]


def preview(job: TuningJob, *, count: int, access: oci.Access = DEFAULT) -> Preview:
    """Return the first `count` training rows of `job` as they are encoded, and counts over many."""
    download.fetch(job.data, token=job.hub_token, access=access)
    tokenizer = models.load_tokenizer(job.model)
    examined = max(count, COUNTED_ROWS)
    found = DataEncoder(job, tokenizer).kept() or _encoded(job, tokenizer, examined)
    rows = [row for row in found.rows[:examined] if not row.held_out]
    encoded = [row.encoded for row in rows]
    return Preview(
        examples=tuple(_preview_example(row, tokenizer) for row in rows[:count]),
        data=found.facts.summary,
        train_rows=found.facts.train_rows,
        held_out_rows=found.facts.held_out_rows,
        max_tokens=found.facts.max_tokens,
        counted=len(rows),
        outcomes=Counter(result.outcome for result in encoded),
        tokens=sum(result.tokens for result in encoded),
        labelled_tokens=sum(result.labelled_tokens for result in encoded),
        sequences=sum(len(result.sequences) for result in encoded),
    )


def _encoded(job: TuningJob, tokenizer: "PreTrainedTokenizerBase", count: int) -> EncodedData:
    """Return the first `count` training rows, encoded here, with what was read of all."""
    data = dataset.load(job.data, folder.local_paths(job.data.urls, job.data.folder))
    train, held_out = divide(data, job.data)
    encoder = tokenize.encoder(job, tokenizer)
    fields = RenderedFields(tokenizer, model=job.model.name, bad_rows=data.bad_rows)
    examined = fields.fit(train[:count])
    results = attempted(examined, tokenize.results(examined, encoder), data.bad_rows)
    rows = tuple(EncodedRow(example.origin, False, result) for example, result in results if result)
    data.bad_rows.conclude("encoding")
    train_rows, held_out_rows = (
        sum(example.origin not in data.bad_rows for example in part) for part in (train, held_out)
    )
    facts = EncodingFacts(
        key="",
        summary=data.summary(),
        max_tokens=encoder.max_tokens,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        questions=(),
        said=(),
    )
    return EncodedData(rows, facts)


def _preview_example(row: EncodedRow, tokenizer: "PreTrainedTokenizerBase") -> PreviewExample:
    return PreviewExample(
        origin=row.origin,
        outcome=row.encoded.outcome,
        full_tokens=row.encoded.full_tokens,
        tokens=row.encoded.tokens,
        labelled_tokens=row.encoded.labelled_tokens,
        sequences=tuple(runs(sequence, tokenizer) for sequence in row.encoded.sequences),
    )


def runs(sequence: TokenizedSequence, tokenizer: "PreTrainedTokenizerBase") -> tuple[TextRun, ...]:
    """Return the text of `sequence`, special tokens included, cut where labels begin or end."""
    texts: list[TextRun] = []
    ids = sequence.ids.tolist()
    end, before = 0, ""
    for labelled, flags in groupby(sequence.loss_mask.tolist()):
        start, end = end, end + len(list(flags))
        # Sentencepiece drops the space before a text's first token: a run's text is what it adds.
        prefix = _text(ids[:end], tokenizer)
        text = prefix[len(before) :] if prefix.startswith(before) else _text(ids[start:end], tokenizer)
        texts.append(TextRun(text, labelled))
        before = prefix
    return tuple(texts)


def _text(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)
