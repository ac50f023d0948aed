"""The data of a job encoded, once on each node and, while nothing about it changes, once for all its runs.

Reads, normalises, splits, renders and encodes, with what each of these modules says and counts; or takes what
an earlier run has made. Does not know training. Start at `DataEncoder.on_this_node`.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import DataError
from runtime.files import disk_errors
from runtime.logs import Overhearing, counted
from runtime.tuning.data import dataset, encoded, encoding_processes, folder, row_cache, tokenize
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.dataset import Dataset
from runtime.tuning.data.encoded import EncodedData, EncodedRow, EncodingFacts
from runtime.tuning.data.example import Example
from runtime.tuning.data.rendered_fields import RenderedFields
from runtime.tuning.data.row_cache import RowCache
from runtime.tuning.data.tokenize import Encoder, TokenizedData, attempted
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import TuningJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

QUESTIONS = 5
"""How many questions the model is asked before and after training."""

_FOLDER = "encoded"

Show = Callable[[int, int], None]
"""Shows how many rows of how many are encoded."""


def _show_nothing(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class DataEncoder:
    """What encodes the data of one job."""

    job: TuningJob
    tokenizer: "PreTrainedTokenizerBase"
    enter: Callable[[str], None] = lambda _phase: None
    """Told the phase that begins: data, then encode."""
    show: Show = _show_nothing

    def on_this_node(self, ranks: Ranks, work: Path) -> EncodedData:
        """Return the encoded data, which one process of each node makes in the folder `work` and all map.

        Raises DataError for data that cannot be used, CapacityError where `work` has no room.
        """
        path = work / f"{_FOLDER}-{ranks.node}"
        with ranks.together():
            if ranks.is_local_main:
                self._provide(path)
        self.enter("encode")
        return encoded.read(path, verified=True)

    def kept(self) -> EncodedData | None:
        """Return what an earlier job has made of the data that lies here, None where none is kept."""
        return RowCache(self.job.data.cache).read(self.key()) if self.job.data.cache else None

    def key(self) -> str:
        """Return what the encoded rows of the data that lies here are kept under."""
        encoder, files = tokenize.encoder(self.job, self.tokenizer), self._files()
        return row_cache.key_of(
            self.job, self.tokenizer, files, max_tokens=encoder.max_tokens, end_ids=encoder.end_ids
        )

    def _provide(self, path: Path) -> None:
        """Have the encoded rows in `path`: an earlier run's, an earlier job's, or new ones."""
        key = self.key()
        cache = RowCache(self.job.data.cache) if self.job.data.cache else None
        if facts := _of_earlier_run(path, key):
            return _repeat(facts, "as an earlier run of this job encoded them")
        with disk_errors(path.parent):
            if cache and (kept := cache.take(key, path)):
                return _repeat(kept, f"as an earlier job encoded them, from {cache.folder}")
            with row_cache.new_folder(path) as made:
                facts = self._make(made, key)
                if not self._is_still(key):
                    log.warning("the data changed while it was encoded: its rows are not kept for later runs")
                    facts, cache = replace(facts, key=""), None
                encoded.write_facts(made, facts)
        if cache:
            cache.keep(key, path)
        return None

    def _is_still(self, key: str) -> bool:
        """Return whether the data that lies here is what it was."""
        try:
            return self.key() == key
        except (OSError, DataError):
            return False

    def _make(self, made: Path, key: str) -> EncodingFacts:
        """Read the data and write its encoded rows into the new folder `made`."""
        with Overhearing("runtime.tuning.data") as heard:
            data, train, held_out = self._read()
            self.enter("encode")
            fields = RenderedFields(self.tokenizer, model=self.job.model.name, bad_rows=data.bad_rows)
            train, held_out = fields.fit(train), fields.fit(held_out)
            encoder = tokenize.encoder(self.job, self.tokenizer)
            encoded.write_rows(made, self._rows(encoder, train, held_out, bad_rows=data.bad_rows))
            data.bad_rows.conclude("encoding")
            trained, tested = encoded.parts(encoded.read_rows(made))
            tokenize.require_rows(trained, len(train), max_tokens=encoder.max_tokens)
            _say(trained, encoder.max_tokens)
            if held_out:
                _say_of_held_out(tested)
        asked = held_out if tested.rows else train
        return EncodingFacts(
            key=key,
            summary=data.summary(),
            max_tokens=encoder.max_tokens,
            train_rows=sum(row.origin not in data.bad_rows for row in train),
            held_out_rows=sum(row.origin not in data.bad_rows for row in held_out),
            questions=sample_questions([row for row in asked if row.origin not in data.bad_rows]),
            said=tuple(heard.lines),
        )

    def _read(self) -> tuple[Dataset, Sequence[Example], Sequence[Example]]:
        """Return the data, and of its rows those to train on and those held out."""
        data = dataset.load(self.job.data, self._files())
        train, held_out = dataset.divide(data, self.job.data)
        log.info(
            "%s from %s: %d to train on, %d held out, %d skipped",
            counted(len(data.examples), "row"), counted(len(data.files), "file"),
            len(train), len(held_out), data.bad_rows.skipped,
        )  # fmt: skip
        return data, train, held_out

    def _rows(
        self, encoder: Encoder, train: Sequence[Example], held_out: Sequence[Example], *, bad_rows: BadRows
    ) -> Iterator[EncodedRow]:
        """Yield what each row becomes, and show how far this is."""
        examples = [*train, *held_out]
        results = attempted(examples, encoding_processes.results(examples, encoder), bad_rows)
        for number, (example, result) in enumerate(results):
            self.show(number + 1, len(examples))
            if result is not None:
                yield EncodedRow(example.origin, number >= len(train), result)

    def _files(self) -> list[Path]:
        return folder.local_paths(self.job.data.urls, self.job.data.folder)


def remove(work: Path) -> None:
    """Remove the encoded rows of a job that is done; what is kept for other jobs stays."""
    for path in work.glob(f"{_FOLDER}-*"):
        shutil.rmtree(path, ignore_errors=True)


def sample_questions(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the first few conversations that end with an answer to a question."""
    usable = (
        e for e in examples if e.messages and e.messages[-1]["role"] == "assistant" and len(e.messages) > 1
    )
    return tuple(islice(usable, QUESTIONS))


def _of_earlier_run(path: Path, key: str) -> EncodingFacts | None:
    """Return what is known of the rows in `path`, None where they are others, damaged or not there."""
    if not path.is_dir():
        return None
    try:
        if encoded.read_facts(path).key != key:
            return None
        return encoded.read(path).facts
    except DataError as error:
        log.warning("the encoded rows of an earlier run are damaged and are made anew (%s)", error)
        return None


def _repeat(facts: EncodingFacts, whose: str) -> None:
    """Say where rows come from, and what was said when they were made."""
    log.info("the rows are read %s", whose)
    for line in facts.said:
        line.repeat()


def _say(train: TokenizedData, limit: int) -> None:
    log.info(
        "%d rows as %d sequences of %d tokens, %d of them labelled; "
        "%d rows cut at %d tokens, %d dropped as too long, %d unlabelled",
        train.rows, len(train.sequences), train.tokens, train.labelled_tokens,
        train.truncated, limit, train.too_long, train.unlabelled,
    )  # fmt: skip


def _say_of_held_out(held_out: TokenizedData) -> None:
    left = held_out.rows
    if held_out.too_long or held_out.unlabelled or not left:
        log.warning(
            "held out: %d rows dropped as too long, %d unlabelled; %s",
            held_out.too_long, held_out.unlabelled,
            f"{left} rows are left" if left else "none is left, so no loss is held out",
        )  # fmt: skip
