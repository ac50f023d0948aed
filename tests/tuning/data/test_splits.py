"""Files' names say what they are for, in the words of Hugging Face's data sets."""

from pathlib import PurePath

import pytest

from runtime.tuning.data import splits

T, V, X = "train", "validation", "test"


@pytest.mark.parametrize(
    "expected",
    [
        {"train.jsonl": T, "validation.jsonl": V, "test.jsonl": X},
        {"train/a.parquet": T, "dev/a.parquet": V, "test/a.parquet": X},
        {"data/train-00000-of-00002.parquet": T, "data/test-00000-of-00001.parquet": X},
        {
            "train_sft-0.parquet": T,
            "test_sft-0.parquet": X,
            "train_gen-0.parquet": T,
            "test_gen-0.parquet": X,
        },
        {"rows.jsonl": T, "valid.jsonl": V, "eval.jsonl.gz": V, "val_data.csv": V},
        {"alpaca-train.json": T, "alpaca-val.json": V, "alpaca_test.json": X},
        {"squad.train.jsonl.zst": T, "squad.dev.jsonl.zst": V},
        {"TRAIN.CSV": T, "Test.csv": X},
        {"python.jsonl": T, "test-driven-development.jsonl": T, "valid-reasons.jsonl": T},
        {"contest.jsonl": T, "latest.jsonl": T, "development.jsonl": T, "trainer.jsonl": T},
        {"test.jsonl": T},
        {"validation.jsonl": T, "test.jsonl": T},
        {"test_data.parquet_download_true": X, "train_data.parquet_download_true": T},
    ],
)
def test_names_of_files_and_folders_tell_their_split(expected: dict[str, str]) -> None:
    found = splits.assign([PurePath(name) for name in expected])
    assert dict(zip(expected, found, strict=True)) == expected


def test_names_of_splits_begin_with_what_they_are_for() -> None:
    assert [splits.named(word) for word in ("train_sft", "test", "Validation", "dev.v2", "all")] == [
        T,
        X,
        V,
        V,
        T,
    ]
