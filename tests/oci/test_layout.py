"""Images in a layout on disk: what other tools read, sameness, atomicity."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError
from runtime.oci.image import MANIFEST
from runtime.oci.layout import Layout
from runtime.oci.store import StoredManifest
from tests.oci.conftest import files, needs


@pytest.mark.system
@needs("skopeo", "umoci")
def test_pushed_layout_is_an_image_for_other_tools(adapter: Path, tmp_path: Path) -> None:
    digest = oci.push(
        adapter, oci.parse(f"oci:{tmp_path}/out:v1"), annotations={"sh.kaito.model.name": "phi-3"}
    )

    name = f"oci:{tmp_path}/out:v1"
    inspected = json.loads(subprocess.check_output(["skopeo", "inspect", name]))
    assert (inspected["Digest"], inspected["Os"], inspected["Architecture"]) == (digest, "linux", "amd64")
    raw = json.loads(subprocess.check_output(["skopeo", "inspect", "--raw", name]))
    assert raw["annotations"]["sh.kaito.model.name"] == "phi-3"
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/out:v1", tmp_path / "bundle"], check=True
    )
    assert files(tmp_path / "bundle/rootfs/data") == files(adapter)


def test_missing_tag_is_reported(adapter: Path, tmp_path: Path) -> None:
    oci.push(adapter, oci.parse(f"oci:{tmp_path}/out:v1"))
    with pytest.raises(RegistryError, match="no such image"):
        oci.pull(oci.parse(f"oci:{tmp_path}/out:v2"), tmp_path / "back")


def test_preflight_refuses_a_file_and_a_foreign_directory(adapter: Path, tmp_path: Path) -> None:
    oci.check_push(oci.parse(f"oci:{tmp_path}/new/out"))
    assert not (tmp_path / "new").exists()
    for place in (adapter, adapter / "adapter_config.json"):
        with pytest.raises(ConfigError):
            oci.check_push(oci.parse(f"oci:{place}"))


def test_two_processes_push_to_one_layout_at_a_time(adapter: Path, tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from runtime import oci\n"
    program += "oci.push(Path(sys.argv[1]), oci.parse(sys.argv[2]))"
    tags = [f"v{number}" for number in range(4)]
    jobs = [
        subprocess.Popen([sys.executable, "-c", program, adapter, f"oci:{tmp_path}/out:{t}"]) for t in tags
    ]
    assert [job.wait(60) for job in jobs] == [0] * 4
    assert sorted(Layout(tmp_path / "out").tags()) == tags


def test_delete_removes_only_what_no_other_image_uses(adapter: Path, tmp_path: Path) -> None:
    kept = oci.parse(f"oci:{tmp_path}/out:kept")
    oci.push(adapter, kept)
    before = files(tmp_path / "out/blobs")
    (adapter / "more.txt").write_text("more")
    oci.push(adapter, kept.tagged("gone"))
    assert Layout(tmp_path / "out").delete("gone")
    assert files(tmp_path / "out/blobs") == before


def written_by_others(tmp_path: Path, adapter: Path, *names: dict[str, str]) -> list[str]:
    """A layout whose images are named by these annotations; return their digests."""
    digests = []
    for number in range(len(names)):
        (adapter / "number").write_text(str(number))
        digests.append(oci.push(adapter, oci.parse(f"oci:{tmp_path}/out:{number}")))
    index = json.loads((tmp_path / "out/index.json").read_text())
    for entry, annotations in zip(index["manifests"], names, strict=True):
        entry["annotations"] = annotations or None
    (tmp_path / "out/index.json").write_text(json.dumps(index))
    return digests


NAME, FULL = "org.opencontainers.image.ref.name", "io.containerd.image.name"


@pytest.mark.parametrize(
    ("names", "wanted", "number"),
    [
        ([{}], "", 0),
        ([{NAME: "v1"}], "", 0),
        ([{NAME: "v1"}, {NAME: "latest"}], "", 1),
        ([{NAME: "docker.io/library/a:v1"}], ":v1", 0),
        ([{}, {NAME: "127.0.0.1:5000/a/b:v1"}], ":v1", 1),
        ([{FULL: "docker.io/library/a:v1", NAME: "x"}], ":v1", 0),
        ([{NAME: "host/a:v1"}, {NAME: "v1"}], ":v1", 1),
    ],
)
def test_images_that_others_named_are_found(
    tmp_path: Path, adapter: Path, names: list[dict[str, str]], wanted: str, number: int
) -> None:
    """Skopeo and buildah write entries without a name, docker buildx and containerd with the full one."""
    digests = written_by_others(tmp_path, adapter, *names)
    assert oci.inspect(oci.parse(f"oci:{tmp_path}/out{wanted}")).digest == digests[number]


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        ([{NAME: "v1"}, {NAME: "v2"}], "", r"holds 2 images, name one by its tag or digest: v1 \(sha256:"),
        ([{}, {}], "", "holds 2 images.*without a tag"),
        ([{NAME: "a/b:v1"}, {NAME: "c/d:v1"}], ":v1", "several images are tagged 'v1'.*a/b:v1"),
        ([{}], ":latest", "no such image"),
    ],
)
def test_an_image_that_is_not_named_well_enough_is_named_for_the_user(
    tmp_path: Path, adapter: Path, names: list[dict[str, str]], wanted: str, message: str
) -> None:
    written_by_others(tmp_path, adapter, *names)
    with pytest.raises(RegistryError, match=message):
        oci.inspect(oci.parse(f"oci:{tmp_path}/out{wanted}"))


@pytest.mark.system
@needs("skopeo", "umoci")
def test_what_skopeo_writes_without_a_tag_is_read(adapter: Path, tmp_path: Path) -> None:
    oci.push(adapter, oci.parse(f"oci:{tmp_path}/ours:v1"))
    subprocess.run(["skopeo", "copy", "-q", f"oci:{tmp_path}/ours:v1", f"oci:{tmp_path}/theirs"], check=True)
    assert files(oci.pull(oci.parse(f"oci:{tmp_path}/theirs"), tmp_path / "back")) == files(adapter)


@pytest.mark.parametrize(
    "index", [b"[]", b"{}", b'{"manifests":1}', b'{"manifests":[1]}',
              b'{"manifests":[{"digest":"sha256:../../x"}]}', b"<", b"[" * 100_000, b" " * (5 << 20)],
    ids=["array", "empty", "number", "numbers", "path", "text", "nested", "large"],
)  # fmt: skip
def test_a_damaged_index_is_an_error(tmp_path: Path, adapter: Path, index: bytes) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out:v1")
    oci.push(adapter, reference)
    (tmp_path / "out/index.json").write_bytes(index)
    with pytest.raises(RegistryError, match=r"not an OCI index|at most 4 MiB"):
        oci.inspect(reference)


def test_deleting_an_image_never_removes_what_is_outside_the_layout(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    layout = Layout(tmp_path / "out")
    named = {"digest": "sha256:../../../precious"}
    manifest = {"config": named, "layers": [named], "manifests": [named, 1]}
    with layout.writing():
        layout.put_manifest(StoredManifest(json.dumps(manifest).encode(), MANIFEST), "v1")
    assert layout.delete("v1")
    assert (tmp_path / "precious").exists()
    assert layout.tags() == []
