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
from runtime.tuning.data.dataset import Dataset, divide
from runtime.tuning.data.example import Example
from runtime.tuning.data.rendered_fields import RenderedFields
from runtime.tuning.data.tokenize import EncodedExample, RowOutcome, TokenizedSequence
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
    data: Dataset
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
    data = dataset.load(job.data, folder.local_paths(job.data.urls, job.data.folder))
    train, held_out = divide(data, job.data)
    encoder = tokenize.encoder(job, models.load_tokenizer(job.model))
    fields = RenderedFields(encoder.tokenizer, model=job.model.name, bad_rows=data.bad_rows)
    examined = fields.fit(train[: max(count, COUNTED_ROWS)])
    encoded: list[tuple[Example, EncodedExample]] = []
    for example in examined:
        with data.bad_rows.attempt(example.origin):
            encoded.append((example, encoder.encode(example)))
    data.bad_rows.conclude("encoding")
    results = [result for _, result in encoded]
    return Preview(
        examples=tuple(
            _preview_example(example, result, encoder.tokenizer) for example, result in encoded[:count]
        ),
        data=data,
        train_rows=sum(example.origin not in data.bad_rows for example in train),
        held_out_rows=sum(example.origin not in data.bad_rows for example in held_out),
        max_tokens=encoder.max_tokens,
        counted=len(results),
        outcomes=Counter(result.outcome for result in results),
        tokens=sum(result.tokens for result in results),
        labelled_tokens=sum(result.labelled_tokens for result in results),
        sequences=sum(len(result.sequences) for result in results),
    )


def _preview_example(
    example: Example, encoded: EncodedExample, tokenizer: "PreTrainedTokenizerBase"
) -> PreviewExample:
    return PreviewExample(
        origin=example.origin,
        outcome=encoded.outcome,
        full_tokens=encoded.full_tokens,
        tokens=encoded.tokens,
        labelled_tokens=encoded.labelled_tokens,
        sequences=tuple(runs(sequence, tokenizer) for sequence in encoded.sequences),
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
