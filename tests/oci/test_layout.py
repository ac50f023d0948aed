"""Images in a layout on disk: what other tools read, sameness, atomicity."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError
from runtime.oci import images
from runtime.oci.image import LAYER_GZIP, LAYER_TAR
from runtime.oci.layout import Layout


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".oci.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


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


def test_same_files_give_the_same_digest_whatever_their_times_and_modes(
    adapter: Path, tmp_path: Path
) -> None:
    first = oci.push(adapter, oci.parse(f"oci:{tmp_path}/one"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in sorted(files(adapter), reverse=True):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(adapter / name, copy / name)
        os.utime(copy / name, (1, 1))
        (copy / name).chmod(0o700)
    assert oci.push(copy, oci.parse(f"oci:{tmp_path}/two")) == first


def test_weights_go_plain_and_text_goes_compressed(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    layers = oci.inspect(reference).manifest.layers
    assert sorted(layer.media_type for layer in layers) == sorted([LAYER_GZIP, LAYER_TAR])
    weights = next(layer for layer in layers if layer.media_type == LAYER_TAR)
    blob = tmp_path / "out/blobs/sha256" / weights.digest.removeprefix("sha256:")
    with tarfile.open(blob) as archive:
        assert archive.getnames() == ["data", "data/adapter_model.safetensors"]


def test_diff_ids_are_the_digests_of_the_unpacked_layers(adapter: Path, tmp_path: Path) -> None:
    import gzip

    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    found = oci.inspect(reference).manifest
    blobs = tmp_path / "out/blobs/sha256"
    config = json.loads((blobs / found.config.digest[7:]).read_bytes())
    expected = []
    for layer in found.layers:
        data = (blobs / layer.digest[7:]).read_bytes()
        data = gzip.decompress(data) if layer.media_type == LAYER_GZIP else data
        expected.append(f"sha256:{hashlib.sha256(data).hexdigest()}")
    assert config["rootfs"]["diff_ids"] == expected


def test_chosen_files_alone_are_pushed(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference, files=["adapter_config.json"])
    assert list(files(oci.pull(reference, tmp_path / "back"))) == ["adapter_config.json"]


@pytest.mark.parametrize("name", ["missing.json", "../adapter/x", "/etc/passwd"])
def test_file_that_is_not_in_the_folder_is_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"passwd|missing|out of"):
        oci.push(adapter, oci.parse(f"oci:{tmp_path}/out"), files=[name])


def test_pull_gives_back_what_was_pushed_and_pushes_to_the_same_digest(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out:v1")
    digest = oci.push(adapter, reference)
    back = oci.pull(reference, tmp_path / "deep/er/back")
    assert files(back) == files(adapter)
    assert oci.push(back, oci.parse(f"oci:{tmp_path}/again")) == digest
    assert [p.name for p in back.parent.iterdir()] == ["back"]


def test_pull_replaces_its_own_folder_and_no_other(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    back = oci.pull(reference, tmp_path / "back")
    (adapter / "new.txt").write_text("new")
    oci.push(adapter, reference)
    assert files(oci.pull(reference, back)) == files(adapter)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="other files"):
        oci.pull(reference, mine)


def test_flipped_byte_is_found_and_leaves_no_folder(adapter: Path, tmp_path: Path) -> None:
    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    layer = max((tmp_path / "out/blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.write_bytes(data)
    with pytest.raises(RegistryError, match="damaged"):
        oci.pull(reference, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_missing_tag_is_said(adapter: Path, tmp_path: Path) -> None:
    oci.push(adapter, oci.parse(f"oci:{tmp_path}/out:v1"))
    with pytest.raises(RegistryError, match="no such image"):
        oci.pull(oci.parse(f"oci:{tmp_path}/out:v2"), tmp_path / "back")


def test_pull_by_digest_wins_over_the_tag(adapter: Path, tmp_path: Path) -> None:
    layout = f"oci:{tmp_path}/out:v1"
    digest = oci.push(adapter, oci.parse(layout))
    (adapter / "new.txt").write_text("new")
    oci.push(adapter, oci.parse(layout))
    back = oci.pull(oci.parse(f"oci:{tmp_path}/out@{digest}"), tmp_path / "back")
    assert "new.txt" not in files(back)


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


def test_import_stays_free_of_the_http_libraries() -> None:
    program = "import sys, runtime.oci; print({'torch', 'oras', 'requests', 'jsonschema'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_full_disk_is_known_before_downloading(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.errors import CapacityError

    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    full: Callable[[Path], object] = lambda path: shutil._ntuple_diskusage(100, 99, 1)  # noqa: E731
    monkeypatch.setattr(images.shutil, "disk_usage", full)
    with pytest.raises(CapacityError, match="1 are free"):
        oci.pull(reference, tmp_path / "back")
