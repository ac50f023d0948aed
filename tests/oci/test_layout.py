"""Images in a layout on disk: what other tools read, sameness, atomicity."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import oci
from runtime.errors import ConfigError, RegistryError
from runtime.oci.layout import Layout
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
