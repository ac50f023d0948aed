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
        {"train_sft/a.arrow": T, "test_sft/a.arrow": X, "train_prefs/a.arrow": T, "eval_sft/a.arrow": V},
        {"split=train/part-0.parquet": T, "split=test/part-0.parquet": X, "split=dev/part-0.parquet": V},
        {"year=2024/split=test_sft/0.parquet": X, "year=2024/split=train_sft/0.parquet": T},
        {"sft-train/0.jsonl": T, "sft-test/0.jsonl": X, "Test Set/0.jsonl": X, "test_data/0.jsonl": X},
        {"python/0.jsonl": T, "test-driven/0.jsonl": T, "split=test-driven/0.jsonl": T},
        {"train/test-driven.jsonl": T, "train/eval of models.jsonl": T, "test/test.jsonl": X},
        {"test/train/0.jsonl": T, "train/test/0.jsonl": X},
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


def test_variants_of_what_is_trained_on_are_told_by_the_kinds_of_their_rows() -> None:
    names = ["train_sft/a.arrow", "train_prefs/a.arrow", "train_gen-00000-of-00002.parquet"]
    assert splits.training_kinds([PurePath(name) for name in names]) == [
        "train_gen",
        "train_prefs",
        "train_sft",
    ]
    same = ["train_sft/a.arrow", "train_sft/b.arrow", "train.jsonl", "train_aa.jsonl", "split=train_sft/a"]
    assert splits.training_kinds([PurePath(name) for name in same]) == ["train_sft"]
