"""`runtime manifest`, and the examples that are its output."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.cli.main import app

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/kubernetes"
GENERATED = ("tuning.yaml", "serving.yaml", "two_nodes.yaml")


@pytest.mark.parametrize("name", GENERATED)
def test_examples_are_what_their_first_line_prints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comment, _, text = (EXAMPLES / name).read_text().partition("\n")
    command = shlex.split(comment.removeprefix("# "))
    assert command[:2] == ["runtime", "manifest"]
    assert CliRunner().invoke(app, command[1:], obj={}).stdout == text


def test_wrong_manifest_is_refused_before_it_is_applied(tmp_path: Path) -> None:
    manifest = (ROOT / "examples/inference/kaito_workspace_phi_3_with_adapter.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(manifest.replace("\ninference:", "\ninfrence:"))
    done = CliRunner().invoke(app, ["manifest", str(tmp_path / "wrong.yaml"), "--image", "image:1"], obj={})
    assert "infrence" in str(done.exception)
