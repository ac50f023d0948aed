"""Images on a base image, and pulls from a layout: what replaces what, what is refused."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import CapacityError, ConfigError, Failure, RegistryError
from runtime.oci import images
from runtime.oci.access import DEFAULT
from runtime.oci.blobs import from_bytes
from runtime.oci.image import CONFIG, LAYER_TAR, assemble, build
from runtime.oci.images import load_base
from tests.oci.conftest import Started, archive, files, fresh, needs, quick, special


@pytest.mark.system
@needs("umoci", "skopeo")
def test_files_on_a_base_image_serve_old_controllers(
    open_registry: Started, adapter: Path, tmp_path: Path
) -> None:
    """The base's files, its config and its layers stay; the base's layers are mounted, not sent again."""
    base, target = fresh(open_registry.host, "busybox"), fresh(open_registry.host, "adapter")
    rootfs = tmp_path / "rootfs"
    (rootfs / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", rootfs / "bin/sh")
    umoci = ["umoci", "--log=error"]
    subprocess.run([*umoci, "init", "--layout", tmp_path / "base"], check=True)
    subprocess.run([*umoci, "new", "--image", f"{tmp_path}/base:v1"], check=True)
    subprocess.run([*umoci, "insert", "--image", f"{tmp_path}/base:v1", rootfs / "bin", "/bin"], check=True)
    subprocess.run([*umoci, "config", "--image", f"{tmp_path}/base:v1", "--config.env=A=b"], check=True)
    copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{tmp_path}/base:v1", f"docker://{base}"]
    subprocess.run(copy, check=True)

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    image = build(adapter, scratch, base=load_base(base, scratch, quick()))
    oci.push_image(lambda: image, target, access=quick(), mount_from=base.repository)

    inspect = ["skopeo", "inspect", "--tls-verify=false", "--config", f"docker://{target}"]
    config = json.loads(subprocess.check_output(inspect))
    assert config["config"]["Env"] == ["A=b"]
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert oci.inspect(target, quick()).manifest.annotations["org.opencontainers.image.base.name"] == str(
        base
    )
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{target}", f"oci:{tmp_path}/out:v1"]
    subprocess.run(copy, check=True)
    unpacked = tmp_path / "bundle"
    subprocess.run([*umoci, "unpack", "--rootless", "--image", f"{tmp_path}/out:v1", unpacked], check=True)
    assert (unpacked / "rootfs/bin/sh").is_file()
    assert files(unpacked / "rootfs/data") == files(adapter)
    assert files(oci.pull(target, tmp_path / "back", access=quick())) == files(adapter)


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


def test_pull_by_digest_wins_over_the_tag(adapter: Path, tmp_path: Path) -> None:
    layout = f"oci:{tmp_path}/out:v1"
    digest = oci.push(adapter, oci.parse(layout))
    (adapter / "new.txt").write_text("new")
    oci.push(adapter, oci.parse(layout))
    back = oci.pull(oci.parse(f"oci:{tmp_path}/out@{digest}"), tmp_path / "back")
    assert "new.txt" not in files(back)


def test_import_stays_free_of_the_http_libraries() -> None:
    program = "import sys, runtime.oci; print({'torch', 'oras', 'requests', 'jsonschema'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


def test_full_disk_is_known_before_downloading(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    reference = oci.parse(f"oci:{tmp_path}/out")
    oci.push(adapter, reference)
    full: Callable[[Path], object] = lambda path: shutil._ntuple_diskusage(100, 99, 1)  # noqa: E731
    monkeypatch.setattr(images.shutil, "disk_usage", full)
    with pytest.raises(CapacityError, match="1 are free"):
        oci.pull(reference, tmp_path / "back")


@pytest.mark.parametrize("history", ["null", '"text"', None])
def test_a_base_image_may_have_no_history(adapter: Path, tmp_path: Path, history: str | None) -> None:
    base = oci.parse(f"oci:{tmp_path}/base:v1")
    layer = from_bytes(archive(("bin/sh", b"sh")), LAYER_TAR)
    stated = f',"history":{history}' if history else ""
    config = f'{{"rootfs":{{"diff_ids":["{layer.descriptor.digest}"]}}{stated}}}'
    oci.push_image(lambda: assemble([layer], from_bytes(config.encode(), CONFIG), annotations={}), base)
    (tmp_path / "scratch").mkdir()
    under = load_base(base, tmp_path / "scratch", DEFAULT)
    image = build(adapter, tmp_path / "scratch", base=under)
    made = json.loads(b"".join(iter(image.blobs[-1].open().read, b"")))
    assert len(made["history"]) == len(made["rootfs"]["diff_ids"]) - 1


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"rootfs":{"diff_ids":5}}', b"{}"])
def test_a_strange_base_image_is_refused(tmp_path: Path, config: bytes) -> None:
    base = oci.parse(f"oci:{tmp_path}/base:v1")
    layer = from_bytes(archive(("bin/sh", b"sh")), LAYER_TAR)
    oci.push_image(lambda: assemble([layer], from_bytes(config, CONFIG), annotations={}), base)
    with pytest.raises(Failure, match=r"no image configuration|no diff_ids"):
        load_base(base, tmp_path / "scratch", DEFAULT)


@pytest.mark.system
def test_a_pull_that_fails_for_good_leaves_nothing(open_registry: Started, tmp_path: Path) -> None:
    """Its blobs are there and verified, but the image is not to be unpacked."""
    reference = fresh(open_registry.host, "hostile")
    layer = from_bytes(archive(("data/a", b"1"), special("data/x", tarfile.SYMTYPE, "/etc")), LAYER_TAR)
    image = assemble([layer], from_bytes(b"{}", CONFIG), annotations={})
    oci.push_image(lambda: image, reference, access=quick())
    target = tmp_path / "new/er/back"
    with pytest.raises(RegistryError, match="refused"):
        oci.pull(reference, target, access=quick())
    assert not list(tmp_path.iterdir())
    target.mkdir(parents=True)
    with pytest.raises(RegistryError, match="refused"):
        oci.pull(reference, target, access=quick())
    assert [path.name for path in target.parent.iterdir()] == ["back"]
