"""`runtime tune`: what a dry run refuses as the pod would."""

import json
from pathlib import Path

import pytest

from runtime.cli import main
from tests.cli.conftest import failure_line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nnodes", "2", "--node-rank", "5"], "node rank is 5 of 2 nodes, expected 0 to 1"),
        (["--nnodes", "2", "--node-rank", "1"], "2 nodes have no rendezvous endpoint"),
        (["--node-rank", "5"], "--node-rank 5: this job has one node; give --nnodes"),
        (["--rdzv-endpoint", "a:1"], "--rdzv-endpoint a:1: this job has one node"),
        (["--credentials", "/nonexistent"], "no such file or directory: /nonexistent"),
        (["--max-data-bytes", "20GB"], "is '20GB', expected bytes, as a number or as in 500Mi, 20Gi or 20G"),
        (["--set", "model.path=/nonexistent"], "flag --set model.path: no such file or directory"),
        (["--output", __file__], "is a file; name a directory"),
        (["--set", "data.file=/nonexistent"], "flag --set data.file: no such file or directory"),
    ],
)
def test_dry_run_refuses_what_the_job_would(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    job = ["tune", "smollm2-135m-instruct", "--data", str(rows), "--dry-run"]
    assert main.run(job, {}) == 0
    capsys.readouterr()
    assert main.run([*job, *flags], {}) == 2
    assert message in failure_line(capsys)


def test_rank_0_of_one_node_is_no_mistake(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    words = [
        "tune",
        "smollm2-135m-instruct",
        "--data",
        str(rows),
        "--dry-run",
        "--nnodes",
        "1",
        "--node-rank",
        "0",
    ]
    assert main.run(words, {}) == 0


@pytest.mark.parametrize("flag", [["--max-data-bytes", "2Gi"], ["--set", "data.max_bytes=2Gi"]])
def test_most_bytes_of_data_are_a_quantity(
    flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    job = ["tune", "smollm2-135m-instruct", "--data", str(rows), "--dry-run", "--json"]
    assert main.run([*job, *flag], {}) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["data.max_bytes"]["value"] == 2 << 30


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "http://169.254.169.254/latest",
            "flag --data: http://169.254.169.254/latest: leads to 169.254.169.254",
        ),
        ("http://2852039166/?t=secret", "leads to 169.254.169.254, a link-local or metadata address"),
        (
            "https://h/a.csv#sha256=00",
            "flag --data: https://h/a.csv: its sha256 has 2 digits, expected #sha256=",
        ),
        ("https://h/a.csv#md5=00", "what follows '#' is no digest, expected #sha256= and 64 hexadecimal"),
    ],
)
def test_dry_run_refuses_addresses_that_are_never_fetched(
    url: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["tune", "smollm2-135m-instruct", "--data", url, "--dry-run"], {}) == 2
    line = failure_line(capsys)
    assert message in line
    assert "secret" not in line


def test_dry_run_refuses_the_folder_of_a_finished_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"text": "a"}\n')
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    words = ["tune", "smollm2-135m-instruct", "--data", str(rows), "--dry-run", "--output", str(folder)]
    assert main.run(words, {}) == 2
    assert "holds an adapter, and which job made it is not recorded" in failure_line(capsys)
    assert main.run([*words, "--overwrite"], {}) == 0


def test_data_after_the_model_is_answered_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["tune", "smollm2-135m-instruct", "tickets.parquet"], {}) == 2
    assert "give it as --data tickets.parquet" in failure_line(capsys)
