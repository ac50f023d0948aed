"""A bad row ends the job or is skipped and counted by its reason, whatever phase finds it."""

import logging

import pytest

from runtime.errors import DataError
from runtime.tuning.data.bad_rows import BadRows


def attempt(bad_rows: BadRows, where: str, message: str) -> None:
    with bad_rows.attempt(where):
        raise DataError(message)


def test_under_fail_the_first_bad_row_ends_the_job_and_is_named_once() -> None:
    bad_rows = BadRows("fail")
    with pytest.raises(DataError, match=r"^a\.jsonl: row 2 column 'x' is empty$"):
        attempt(bad_rows, "a.jsonl: row 2", "a.jsonl: row 2 column 'x' is empty")
    with pytest.raises(DataError, match=r"^a\.jsonl: row 3: the template refuses it$"):
        attempt(bad_rows, "a.jsonl: row 3", "the template refuses it")
    with bad_rows.attempt("a.jsonl: row 4"):
        pass
    with pytest.raises(
        DataError, match=r"^a\.jsonl: row 5: is empty \(--on-bad-row skip leaves such rows out\)$"
    ):
        attempt(bad_rows, "a.jsonl: row 5", "is empty")


def test_under_skip_bad_rows_are_counted_by_reason_and_the_first_three_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    bad_rows = BadRows("skip")
    bad_rows.rows = 100
    attempt(bad_rows, "a.jsonl: row 1", "a.jsonl: row 1 is not valid JSON")
    for row in range(2, 5):
        where = f"a.jsonl: row {row}"
        attempt(bad_rows, where, f"{where} column 'messages' message {row} has role 'x'")
    bad_rows.conclude("reading")
    attempt(bad_rows, "a.jsonl: row 9", "the template refuses it")
    bad_rows.conclude("encoding")
    bad_rows.conclude("nothing new")
    reading, encoding = caplog.messages
    assert reading == (
        "reading: 4 of 100 rows cannot be used (3 × column 'messages' message 2 has role 'x'; 1 × is not "
        "valid JSON) and are skipped; the first: a.jsonl: row 1 is not valid JSON; a.jsonl: row 2 column "
        "'messages' message 2 has role 'x'; a.jsonl: row 3 column 'messages' message 3 has role 'x'"
    )
    assert "5 of 100 rows" in encoding
    assert "1 × the template refuses it" in encoding
    assert bad_rows.skipped == 5
    assert "a.jsonl: row 9" in bad_rows
    assert "a.jsonl: row 8" not in bad_rows


def test_more_than_half_skipped_is_an_error_that_says_why() -> None:
    bad_rows = BadRows("skip")
    bad_rows.rows = 4
    for row in (1, 2):
        attempt(bad_rows, f"a.csv: row {row}", "has 3 columns")
    bad_rows.conclude("reading")
    attempt(bad_rows, "a.csv: row 4", "has 3 columns")
    with pytest.raises(DataError, match=r"3 of 4 rows cannot be used \(3 × has 3 columns\): more than half"):
        bad_rows.conclude("reading")


def test_many_reasons_are_summed_up_and_other_errors_pass() -> None:
    bad_rows = BadRows("skip")
    bad_rows.rows = 8
    for row, letter in enumerate("abcdefgh"):
        attempt(bad_rows, f"row {row}", f"has {letter}")
    with pytest.raises(DataError, match=r"1 × has e; 3 other reasons\)"):
        bad_rows.conclude("reading")
    with pytest.raises(KeyError), bad_rows.attempt("row 1"):
        raise KeyError
