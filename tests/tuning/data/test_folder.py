"""Folders are read as the tools that write them mean them."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import DataError
from runtime.tuning.data import folder

Saved = Path


def names(path: Path) -> dict[str, str]:
    return {file.name: file.split for file in folder.find(path)}


def touch(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "a"}\n')


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    import datasets

    root = tmp_path_factory.mktemp("saved") / "data"
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}] * 5)
    parts = datasets.DatasetDict(train=rows, validation=rows, test=rows)
    parts.save_to_disk(root, num_shards={"train": 2, "validation": 1, "test": 1})
    return root


def test_what_save_to_disk_writes_is_arrow_files_alone_with_their_splits(saved: Saved) -> None:
    assert names(saved) == {
        "test/data-00000-of-00001.arrow": "test",
        "train/data-00000-of-00002.arrow": "train",
        "train/data-00001-of-00002.arrow": "train",
        "validation/data-00000-of-00001.arrow": "validation",
    }
    (saved / "train" / "cache-1234.arrow").write_bytes(b"ARROW1")
    assert "train/cache-1234.arrow" not in names(saved)
    assert set(names(saved / "train")) == {"data-00000-of-00002.arrow", "data-00001-of-00002.arrow"}


def test_a_copy_of_a_saved_folder_without_a_part_is_an_error(tmp_path: Path) -> None:
    files = [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    (tmp_path / "data-00000-of-00002.arrow").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"names data-00001-of-00002\.arrow, which is not there: the copy is not"
    ):
        folder.find(tmp_path)


def test_a_checkout_of_the_hub_is_its_data_files(tmp_path: Path) -> None:
    touch(
        tmp_path, "dataset_infos.json", ".gitattributes", ".git/objects/a.json", ".cache/a.parquet", "LICENSE"
    )
    touch(tmp_path, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    touch(tmp_path, "data/test-00000-of-00001.parquet")
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "README.md").write_text("# A data set")
    found = names(tmp_path)
    assert len(found) == 3
    assert found["data/test-00000-of-00001.parquet"] == "test"
    card = "---\nconfigs:\n- data_files:\n  - split: train\n    path: data/test-*\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert names(tmp_path) == {"data/test-00000-of-00001.parquet": "train"}


def test_outputs_of_spark_are_their_parts(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "_SUCCESS",
        "_committed_1",
        ".part-0.json.crc",
        "part-0.snappy.parquet",
        "part-1.c000.csv.gz",
    )
    touch(tmp_path, "_temporary/a.json")
    assert set(names(tmp_path)) == {"part-0.snappy.parquet", "part-1.c000.csv.gz"}


def test_json_about_the_data_is_left_out_beside_data_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    touch(tmp_path, "metadata.json")
    assert set(names(tmp_path)) == {"metadata.json"}
    touch(tmp_path, "rows.jsonl", "dataset_info.json")
    assert set(names(tmp_path)) == {"rows.jsonl"}
    assert "1 file left out, because of names that mean a description of data (metadata.json)" in caplog.text


def test_a_file_without_suffix_is_data_by_its_first_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part-00000")
    (tmp_path / "rows").write_text('{"text": "a"}')
    (tmp_path / "README").write_text("data")
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8bdamaged")
    assert set(names(tmp_path)) == {"part-00000", "rows"}


def test_missing_parts_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(
        tmp_path,
        "a/train-00000-of-00003.jsonl",
        "a/train-00002-of-00003.jsonl",
        "b/train-00000-of-00001.jsonl",
    )
    folder.find(tmp_path)
    assert caplog.messages == ["a/train: only 2 of its 3 parts are there"]


def test_addresses_with_one_name_keep_the_suffixes_of_format_and_compression(tmp_path: Path) -> None:
    urls = ["https://a.example/1/train.jsonl.gz", "https://a.example/2/train.jsonl.gz"]
    first, second = folder.local_paths(urls, tmp_path)
    assert first != second
    assert [path.name[:6] + path.name[-9:] for path in (first, second)] == ["train-.jsonl.gz"] * 2


def test_the_cache_of_the_hub_is_its_checkout(tmp_path: Path) -> None:
    touch(tmp_path, "blobs/0", "refs/main")
    for revision in ("a", "b"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "rows.jsonl").symlink_to(tmp_path / "blobs" / "0")
    (tmp_path / "refs" / "main").write_text("b")
    (found,) = folder.find(tmp_path)
    assert found.path == tmp_path / "snapshots" / "b" / "rows.jsonl"
    (tmp_path / "refs" / "main").unlink()
    with pytest.raises(DataError, match="has 2 revisions; give the folder of one"):
        folder.find(tmp_path)


def test_a_format_that_is_set_chooses_its_files_or_is_that_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    touch(tmp_path, "README.md", "notes.parquet", "rows.jsonl")
    assert [file.name for file in folder.find(tmp_path, extension="jsonl")] == ["rows.jsonl"]
    assert caplog.messages == [
        f"{tmp_path}: 1 file left out, because they are no jsonl files (notes.parquet)"
    ]
    assert len(folder.find(tmp_path, extension="csv")) == 3


def test_copies_that_editors_leave_are_no_data(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.jsonl",
        "a.jsonl.bak",
        "a.jsonl~",
        "~$a.csv",
        "a.csv.tmp",
        "._a.jsonl",
        "b.parquet_download",
    )
    assert set(names(tmp_path)) == {"a.jsonl", "b.parquet_download"}


def test_splits_for_several_ways_of_training_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}])
    datasets.DatasetDict(train_sft=rows, test_sft=rows, train_prefs=rows).save_to_disk(tmp_path / "data")
    assert names(tmp_path / "data") == {
        "test_sft/data-00000-of-00001.arrow": "test",
        "train_prefs/data-00000-of-00001.arrow": "train",
        "train_sft/data-00000-of-00001.arrow": "train",
    }
    (said,) = caplog.messages
    assert said.startswith("train_prefs and train_sft are all trained on")
    caplog.clear()
    assert set(names(tmp_path / "data" / "train_sft").values()) == {"train"}
    assert not caplog.messages


def test_rows_that_a_delta_table_has_removed_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    touch(tmp_path, "lake/part-0.parquet", "lake/part-1.parquet", "more.jsonl")
    (tmp_path / "lake" / "_delta_log").mkdir()
    (tmp_path / "lake" / "_delta_log" / f"{0:020}.json").write_text(
        '{"add": {"path": "part-0.parquet"}}\n'
        '{"remove": {"path": "part-0.parquet"}}\n{"add": {"path": "part-1.parquet"}}\n'
    )
    assert set(names(tmp_path)) == {"lake/part-1.parquet", "more.jsonl"}
    assert "1 file left out, because a table has removed them (lake/part-0.parquet)" in caplog.text


def test_files_that_training_tools_write_beside_data_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    about = [
        "results.json", "all_results.json", "validation_results.json", "trainer_state.json", "config.json",
        "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json", "vocab.json",
        "checkpoint-10/model.safetensors.index.json", "run/metrics.json",
    ]  # fmt: skip
    touch(tmp_path, *about)
    assert set(names(tmp_path)) == set(about)
    touch(tmp_path, "train.jsonl")
    assert set(names(tmp_path)) == {"train.jsonl"}
    assert (
        "11 files left out, because of names that mean a description of data (adapter_config" in caplog.text
    )
