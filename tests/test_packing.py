"""What an image of a folder holds and says: the same for `tune` and `push`, and never a job's own files."""

import gzip
import json
import logging
import tarfile
from pathlib import Path

import pytest

from runtime import oci, packing
from runtime.cli import main
from runtime.errors import ConfigError

SECRET = "sig=s3cr3t-signature"
SAFE = "0" * 64
PHI = "microsoft/Phi-3-mini-4k-instruct"


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """An output folder as a finished job, and people after it, leave it."""
    folder = tmp_path / "out"
    state = f'{{"url": "https://store.example/data?{SECRET}"}}'
    report = {
        "job": "my-job",
        "model": {"name": "phi-3-mini-4k-instruct", "repository": PHI, "revision": "a" * 40},
        "data": {"files": [{"name": "rows", "sha256": SAFE}]},
    }
    for name, text in {
        "adapter_config.json": '{"r": 8}',
        "adapter_model.safetensors": "weights",
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "tuning_report.json": json.dumps(report),
        "report.html": "<html>",
        "fine_tuning_completed.txt": "done",
        "thesis.tex": "years of work",
        "runs/events.1": SECRET,
        ".work/job.json": state,
        ".work/finished": "f",
        ".work/history.jsonl": "{}",
        ".work/checkpoints/checkpoint-10/optimizer.pt": "state",
        ".env": SECRET,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


ADAPTER = {
    "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
    "tuning_report.json", "report.html",
}  # fmt: skip


def content(layout: Path) -> bytes:
    """All bytes of a layout, its layers unpacked too."""
    blobs = [path.read_bytes() for path in layout.rglob("*") if path.is_file()]
    return b"".join([*blobs, *(gzip.decompress(blob) for blob in blobs if blob.startswith(b"\x1f\x8b"))])


def test_a_jobs_folder_gives_the_adapter_and_what_is_left_out_is_said(
    job_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert set(packing.files(job_folder)) == ADAPTER
    assert "not in the image: .env, .work, fine_tuning_completed.txt, runs, thesis.tex" in caplog.text


def test_other_folders_give_all_but_hidden_files_and_training_state(tmp_path: Path) -> None:
    given = {
        "config.json",
        "model.safetensors",
        "sub/tokenizer.model",
        "optimizer.md",
        "checkpoint-notes.txt",
    }
    left_out = {
        ".git/config", ".env", "sub/.cache/x", ".ipynb_checkpoints/a", "checkpoint-100/model.safetensors",
        "global_step10/x.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth",
        "trainer_state.json", "training_args.bin", "fine_tuning_completed.txt", ".oci.json",
    }  # fmt: skip
    for name in given | left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(packing.files(tmp_path)) == given
    assert packing.files(tmp_path, ["optimizer.pt"]) == ["optimizer.pt"]


def test_a_link_that_leads_nowhere_matters_only_where_it_would_be_pushed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/link").symlink_to("nowhere")
    assert packing.files(tmp_path) == ["config.json"]
    (tmp_path / "weights").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="weights: a link to 'nowhere'"):
        packing.files(tmp_path)


@pytest.mark.parametrize("name", [".work/job.json", "./.work/job.json", "x/.work/a"])
def test_a_jobs_own_files_are_not_pushed_by_name_either(job_folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="may hold secrets"):
        packing.files(job_folder, [name])


def test_push_takes_no_secret_and_no_state(
    job_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--modelpack"]):
        layout = tmp_path / f"layout{len(flags)}"
        assert main.run(["push", str(job_folder), f"oci:{layout}:v1", *flags], {}) == 0
        assert SECRET.encode() not in content(layout)
        assert b"optimizer" not in content(layout)
        pulled = oci.pull(oci.parse(f"oci:{layout}:v1"), tmp_path / f"back{len(flags)}")
        assert {path.name for path in pulled.iterdir()} - {".oci.json"} == ADAPTER
    capsys.readouterr()


def test_annotations_come_from_the_report(job_folder: Path) -> None:
    assert packing.annotations(job_folder) == {
        "org.opencontainers.image.title": "my-job",
        "sh.kaito.model.name": "phi-3-mini-4k-instruct",
        "sh.kaito.model.repository": PHI,
        "sh.kaito.model.revision": "a" * 40,
        "sh.kaito.tuning.data.sha256": SAFE,
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"base_model_name_or_path": PHI, "revision": "b" * 40},
            {
                "sh.kaito.model.name": "phi-3-mini-4k-instruct",
                "sh.kaito.model.repository": PHI,
                "sh.kaito.model.revision": "b" * 40,
            },
        ),
        (
            {"base_model_name_or_path": "someone/own-model", "revision": None},
            {"sh.kaito.model.name": "someone/own-model", "sh.kaito.model.repository": "someone/own-model"},
        ),
        ({"base_model_name_or_path": "/workspace/tfs/weights", "revision": "main"}, {}),
        ({"base_model_name_or_path": ["a/b"]}, {}),
        ({}, {}),
        ([], {}),
    ],
)
def test_annotations_of_an_adapter_without_a_report_name_its_base_model(
    tmp_path: Path, config: object, expected: dict[str, str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert packing.annotations(tmp_path) == expected


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"model": 1, "data": {"files": 7}, "job": []}'])
def test_a_strange_report_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "tuning_report.json").write_text(text)
    assert packing.annotations(tmp_path) == {}


def test_a_users_annotation_wins_and_a_base_image_keeps_the_models(
    job_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"oci:{tmp_path}/base:v1"
    (tmp_path / "busybox").mkdir()
    (tmp_path / "busybox/sh").write_text("sh")
    oci.push(tmp_path / "busybox", oci.parse(base))
    image = f"oci:{tmp_path}/layout:v1"
    flags = ["--annotation", "sh.kaito.model.name=mine", "--base", base]
    assert main.run(["push", str(job_folder), image, *flags], {}) == 0
    capsys.readouterr()
    found = oci.inspect(oci.parse(image)).manifest.annotations
    assert found["sh.kaito.model.name"] == "mine"
    assert found["sh.kaito.model.repository"] == PHI
    assert found["org.opencontainers.image.base.name"] == base


def test_tar_layers_name_their_files_in_order_without_times_and_owners(
    job_folder: Path, tmp_path: Path
) -> None:
    reference = oci.parse(f"oci:{tmp_path}/layout:v1")
    oci.push(job_folder, reference, files=packing.files(job_folder))
    (layer,) = oci.inspect(reference).manifest.layers
    blob = tmp_path / "layout/blobs/sha256" / layer.digest.removeprefix("sha256:")
    with tarfile.open(blob) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == ["data", *(f"data/{name}" for name in sorted(ADAPTER))]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
