"""`runtime push`, `pull` and `inspect` as a user types them: output, one line per failure, exit status."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from runtime import oci
from runtime.cli import main
from runtime.oci.blobs import from_bytes
from runtime.oci.decompression import zstd
from runtime.oci.image import CONFIG, LAYER_TAR, assemble
from tests.cli.conftest import failure_line
from tests.oci.conftest import archive, special
from tests.oci.keypairs import make_pair


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "notes.md").write_text("notes")
    return made


def test_push_inspect_pull_through_a_layout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = f"oci:{tmp_path}/out:v1"
    assert main.run(["push", str(folder), image, "--annotation", "a.b=c=d"], {}) == 0
    digest = capsys.readouterr().out.strip()
    assert digest.startswith("sha256:")
    assert main.run(["inspect", image, "--json"], {}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["digest"], shown["kind"], shown["annotations"]) == (digest, "image", {"a.b": "c=d"})
    assert main.run(["inspect", image], {}) == 0
    assert digest in capsys.readouterr().out
    assert main.run(["pull", image, str(tmp_path / "back")], {}) == 0
    assert (tmp_path / "back/notes.md").read_text() == "notes"


def test_push_takes_chosen_files_bases_and_modelpack(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, on_base, pack = (f"oci:{tmp_path}/{name}" for name in ("base", "on-base", "pack"))
    assert main.run(["push", str(folder), base, "--file", "notes.md"], {}) == 0
    assert main.run(["push", str(folder), on_base, "--base", base, "--file", "adapter_config.json"], {}) == 0
    assert main.run(["pull", on_base, str(tmp_path / "both")], {}) == 0
    assert sorted(p.name for p in (tmp_path / "both").glob("[!.]*")) == ["adapter_config.json", "notes.md"]
    assert main.run(["push", str(folder), pack, "--modelpack"], {}) == 0
    capsys.readouterr()
    assert main.run(["inspect", pack, "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "modelpack"


def test_signed_push_is_required_by_pull_and_shown_by_inspect(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, pair = f"oci:{tmp_path}/out:v1", make_pair(tmp_path, password="pass", form="SIGSTORE")
    required = ["--require-signature", str(pair.public)]
    assert main.run(["push", str(folder), image, "--sign", str(pair.private)], {}) == 2
    assert "COSIGN_PASSWORD" in failure_line(capsys)
    assert main.run(["push", str(folder), image, "--no-provenance"], {}) == 0
    assert main.run(["pull", image, str(tmp_path / "back"), *required], {}) == 5
    assert "is not signed" in failure_line(capsys)
    secret = {"COSIGN_PASSWORD": "pass"}
    assert main.run(["push", str(folder), image, "--sign", str(pair.private)], secret) == 0
    assert main.run(["pull", image, str(tmp_path / "back"), *required], {}) == 0
    capsys.readouterr()
    assert main.run(["inspect", image, *required, "--json"], {}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["signatures"] == [f"by {pair.public}: valid"]
    assert shown["statements"][0]["state"] == f"signed by {pair.public}"
    assert shown["bills_of_materials"][0]["bomFormat"] == "CycloneDX"
    other = make_pair(tmp_path / "out")
    assert main.run(["inspect", image, "--require-signature", str(other.public)], {}) == 5
    shown_all, error = capsys.readouterr()
    assert "by another key than those given" in shown_all
    assert "none by the required key" in error
    environment = {"RUNTIME_REQUIRE_SIGNATURE": str(other.public)}
    assert main.run(["pull", image, str(tmp_path / "new")], environment) == 5
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["push", "nowhere", "oci:x"], 2, "no such directory"),
        (["push", ".", "ACR.azurecr.io/IMAGE:1"], 2, "lower-case"),
        (["push", ".", "oci:x", "--annotation", "novalue"], 2, "KEY=VALUE"),
        (["push", ".", "oci:x", "--auth", "nowhere.json"], 2, "Docker config.json"),
        (["push", ".", "oci:x", "--base", "oci:y", "--modelpack"], 2, "exclude"),
        (["pull", "oci:nowhere", "y"], 5, "no such image"),
        (["inspect", "oci:nowhere"], 5, "no such image"),
    ],
)
def test_failure_is_one_line_with_its_status(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert main.run(arguments, {}) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


HOSTILE = {
    "link out": archive(special("data/x", tarfile.SYMTYPE, "/etc/passwd")),
    "device": archive(special("data/x", tarfile.CHRTYPE)),
    "no data": archive(("etc/x", b"1")),
    "no archive": b"text" * 200,
    "cut gzip": gzip.compress(archive(("data/a", b"1")))[:-20],
    "cut zstd": zstd.compress(archive(("data/a", b"1")))[:-20],
    "sparse": archive(special("data/x", tarfile.GNUTYPE_SPARSE)),
    "unknown kind": archive(special("data/x", b"Z")),
}


@pytest.mark.parametrize("layer", HOSTILE)
def test_hostile_image_is_one_line_with_exit_status_5(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: str
) -> None:
    image = f"oci:{tmp_path}/layout:v1"
    blobs = [from_bytes(HOSTILE[layer], LAYER_TAR)]
    oci.push_image(lambda: assemble(blobs, from_bytes(b"{}", CONFIG), annotations={}), oci.parse(image))
    capsys.readouterr()
    assert main.run(["pull", image, str(tmp_path / "back")], {}) == 5
    said = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line or "error" in line]
    assert len(said) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["layout"]
