"""Rows are encoded once on each node, and read instead while nothing about them changes."""

import copy
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from runtime import models
from runtime.tuning.data import dataset, encoding, tokenize
from runtime.tuning.data.encoded import ROWS, EncodedData
from runtime.tuning.data.encoding import QUESTIONS, DataEncoder, sample_questions
from runtime.tuning.data.example import Example
from runtime.tuning.data.preview import preview
from runtime.tuning.data.row_cache import RowCache
from runtime.tuning.identity import rows_digest
from runtime.tuning.process.ranks import Ranks
from runtime.tuning.settings import DataSource, Encoding, TuningJob
from tests.tuning.conftest import tiny_job

ALONE = Ranks()
Q = {"role": "user", "content": "q"}


def answered(text: str) -> dict[str, Any]:
    return {"messages": [Q, {"role": "assistant", "content": text}]}


ROWS_OF_ALL_KINDS = [
    *(answered(f"answer {number} " * (number % 5 + 1)) for number in range(60)),
    {"messages": [Q]},  # nothing to learn
    answered("long " * 100),
    {"messages": [Q, answered("x")["messages"][1]] * 20},
    answered(""),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return models.load_tokenizer(tiny_job(tiny_llama_dir, Path(), Path()).model)


@pytest.fixture
def make(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., TuningJob]:
    """Return a maker of jobs on rows of all kinds, whose cache is the same."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in ROWS_OF_ALL_KINDS))

    def job(**settings: Any) -> TuningJob:
        source = {"folder": tmp_path / "data", "on_bad_row": "skip", "cache": tmp_path / "cache"}
        data = DataSource(**{**source, **settings.pop("data", {})})
        limits = Encoding(**{"max_tokens": 64, **settings.pop("encoding", {})})
        return tiny_job(tiny_llama_dir, tmp_path, tmp_path, data=data, encoding=limits, **settings)

    return job


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Example]]:
    """Yield the examples that were encoded, rather than read."""
    seen: list[Example] = []
    encode = tokenize.Encoder.encode

    def counting(self: tokenize.Encoder, example: Example) -> Any:
        seen.append(example)
        return encode(self, example)

    monkeypatch.setattr(tokenize.Encoder, "encode", counting)
    yield seen


def run(job: TuningJob, tokenizer: Any, work: Path, ranks: Ranks = ALONE) -> EncodedData:
    return DataEncoder(job, tokenizer).on_this_node(ranks, work)


def same(one: EncodedData, other: EncodedData) -> bool:
    """Return whether two runs train on the same, say the same and count the same."""
    split, again = one.tokenized(), other.tokenized()
    counts = [(part.truncated, part.too_long, part.unlabelled) for part in (split.train, again.train)]
    return (
        rows_digest(split) == rows_digest(again)
        and counts[0] == counts[1]
        and [(row.origin, row.held_out) for row in one.rows] == [(r.origin, r.held_out) for r in other.rows]
        and one.facts == other.facts
    )


def test_rows_are_those_of_the_modules_one_after_another(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make(data={"train_share": 0.8})
    found = run(job, tokenizer, tmp_path / "work")
    data = dataset.load(job.data)
    train, held_out = dataset.divide(data, job.data)
    encoder = tokenize.encoder(job, tokenizer)
    parts = [tokenize.encode(part, encoder, data.bad_rows) for part in (train, held_out)]
    assert rows_digest(found.tokenized()) == rows_digest(tokenize.TokenizedSplit(*parts))
    assert found.facts.summary == data.summary()
    assert found.facts.summary.skipped == 2
    assert found.tokenized().train.truncated + found.tokenized().held_out.truncated == 2


def test_a_resumed_and_a_repeated_job_read_the_same_rows_and_say_the_same(
    make: Any, tokenizer: Any, tmp_path: Path, encoded_rows: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = make()
    first = run(job, tokenizer, tmp_path / "work")
    said = [record.getMessage() for record in caplog.records]
    assert any("rows cannot be used" in line for line in said)
    encoded_rows.clear()
    for work, whose in (("work", "an earlier run of this job"), ("another", "an earlier job")):
        caplog.clear()
        again = run(job, tokenizer, tmp_path / work)
        assert same(first, again)
        heard = [record.getMessage() for record in caplog.records]
        assert heard[1:] == said
        assert whose in heard[0]
    assert not encoded_rows


@pytest.mark.parametrize(
    "changed",
    [
        {"encoding": {"max_tokens": 48}},
        {"encoding": {"loss_on": "all"}},
        {"encoding": {"too_long": "drop"}},
        {"data": {"shuffle_seed": 7}},
        {"data": {"train_share": 0.5}},
        {"data": {"messages_column": "messages"}},
        {"data": {"cache": None}},
    ],
)
def test_rows_are_made_anew_for_another_encoding(
    make: Any, tokenizer: Any, tmp_path: Path, changed: dict[str, Any], encoded_rows: list[Example]
) -> None:
    run(make(), tokenizer, tmp_path / "work")
    encoded_rows.clear()
    run(make(**changed), tokenizer, tmp_path / "other")
    assert encoded_rows


def test_rows_are_made_anew_for_other_bytes_and_another_template(
    make: Any, tokenizer: Any, tmp_path: Path, encoded_rows: list[Example]
) -> None:
    job = make()
    run(job, tokenizer, tmp_path / "work")
    for change in ("data", "template"):
        encoded_rows.clear()
        if change == "data":
            with (tmp_path / "data" / "rows.jsonl").open("a") as file:
                file.write(json.dumps(answered("one more")) + "\n")
        else:
            other = job.model.model_copy(update={"chat_template": tokenizer.chat_template + " "})
            tokenizer = models.load_tokenizer(other)
        run(job, tokenizer, tmp_path / "work")
        assert encoded_rows, change


def test_damaged_rows_are_made_anew_and_that_is_said(
    make: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make()
    first = run(job, tokenizer, tmp_path / "work")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray((path / ROWS).read_bytes())
    content[len(content) // 2] ^= 1
    (path / ROWS).unlink()  # the same file as in the first job's folder
    (path / ROWS).write_bytes(content)
    assert same(first, run(job, tokenizer, tmp_path / "another"))
    assert "damaged and are made anew (" in caplog.text
    assert same(first, run(job, tokenizer, tmp_path / "third"))


def test_an_entry_that_another_job_removes_is_made_anew(
    make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, read = make(), RowCache.read
    first = run(job, tokenizer, tmp_path / "work")

    def removed(self: RowCache, key: str) -> EncodedData | None:
        found = read(self, key)
        (self.folder / key / ROWS).unlink()
        return found

    monkeypatch.setattr(RowCache, "read", removed)
    assert same(first, run(job, tokenizer, tmp_path / "other"))


def test_a_cache_that_cannot_be_looked_into_ends_no_job(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    job = make(data={"cache": tmp_path / ("n" * 300)})
    assert run(job, tokenizer, tmp_path / "work").rows


def test_data_that_changes_while_it_is_encoded_is_not_taken_for_what_it_was(
    make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, load, file = make(), dataset.load, tmp_path / "data" / "rows.jsonl"
    content = file.read_bytes()

    def appended(*args: Any) -> Any:
        file.write_bytes(content + json.dumps(answered("later")).encode())
        return load(*args)

    monkeypatch.setattr(dataset, "load", appended)
    changed = run(job, tokenizer, tmp_path / "work")
    monkeypatch.undo()
    file.write_bytes(content)
    for work in ("work", "other"):
        assert run(job, tokenizer, tmp_path / work).facts.summary.rows == changed.facts.summary.rows - 1


def test_names_that_are_no_characters_are_kept_and_read(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    job, file = make(), tmp_path / "data" / "rows.jsonl"
    rows = [
        {"messages": [{**Q, "\ud800": 1}, answered(f"a {n}")["messages"][1]], "\udfff": 1} for n in range(20)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file.rename(os.fsdecode(os.fsencode(file.parent) + b"/r\xe9.jsonl"))
    first = run(job, tokenizer, tmp_path / "work")
    assert first.facts.summary.files[0].name == "r?.jsonl"
    assert same(first, run(job, tokenizer, tmp_path / "other"))


def test_other_code_of_a_models_tokenizer_is_another_tokenizer(
    make: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, keys = tmp_path / "tokenization_own.py", set()
    for text in ("class Own:\n    pass\n", "class Own:\n    lower = True\n"):
        code.write_text(text)
        own = importlib.util.spec_from_file_location("transformers_modules.own", code)
        module = importlib.util.module_from_spec(own)
        monkeypatch.setitem(sys.modules, own.name, module)
        own.loader.exec_module(module)
        kind = type("Own", (module.Own, type(tokenizer)), {"__module__": own.name})
        mine = copy.copy(tokenizer)
        mine.__class__ = kind
        keys.add(DataEncoder(make(), mine).key())
    assert len(keys) == 2


def test_one_process_of_a_node_encodes_for_all(
    make: Any, tokenizer: Any, tmp_path: Path, encoded_rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "together", lambda self: nullcontext())
    job = make(data={"cache": None})
    ranks = [Ranks(rank, rank % 2, 4, 2) for rank in range(4)]
    found = [run(job, tokenizer, tmp_path / "work", rank) for rank in ranks]
    assert all(same(found[0], other) for other in found[1:])
    assert len(encoded_rows) == 2 * len({row.origin for row in encoded_rows})  # once on each node
    assert not found[0].rows[0].encoded.sequences[0].ids.flags.owndata
    encoding.remove(tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_preview_reads_what_a_job_has_encoded(
    make: Any, tokenizer: Any, tmp_path: Path, encoded_rows: list[Example]
) -> None:
    job = make()
    alone = preview(make(data={"cache": None}), count=4)
    run(job, tokenizer, tmp_path / "work")
    encoded_rows.clear()
    assert preview(job, count=4) == alone
    assert not encoded_rows


@pytest.mark.parametrize(("long", "kept"), [(1, 1), (2, None)])
def test_held_out_rows_that_teach_nothing_are_dropped_and_said(
    make: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, long: int, kept: int | None
) -> None:
    rows = {"train": ["a"] * 4, "validation": ["a " * 100] * long + ["a"] * (2 - long)}
    folder = tmp_path / "split"
    folder.mkdir()
    for name, answers in rows.items():
        lines = (json.dumps(answered(answer)) for answer in answers)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    job = make(data={"folder": folder}, encoding={"too_long": "drop"})
    held_out = run(job, tokenizer, tmp_path / "work").tokenized().held_out
    assert (held_out and held_out.rows) == kept
    left = "none is left, so no loss is held out" if kept is None else "1 rows are left"
    assert f"held out: {long} rows dropped as too long, 0 unlabelled; {left}" in caplog.text


def conversation(*roles: str) -> Example:
    return Example(tuple({"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)))


def test_questions_are_conversations_that_end_with_an_answer() -> None:
    usable = conversation("user", "assistant")
    others = [conversation("assistant"), conversation("user"), Example((), text="plain text")]
    assert sample_questions([*others, usable]) == (usable,)
    assert len(sample_questions([usable] * 20)) == QUESTIONS
