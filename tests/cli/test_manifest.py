"""`runtime manifest`, and the examples that are its output."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.cli import main
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


SERVING = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
resource: {instanceType: Standard_NC24ads_A100_v4}
inference: {preset: {name: PRESET}}
"""


@pytest.mark.parametrize(
    ("preset", "flags", "status"),
    [
        ("phi-4", [], 0),
        ("phi-4", ["--api-key-secret", "keys:token", "--cpu", "4", "--memory", "20Gi"], 0),
        ("phi-4", ["--api-key-secret", "keys:"], 2),
        ("phi-4", ["--api-key-file-secret", "keys"], 0),
        ("phi-4", ["--api-key-file-secret", "keys:a b"], 2),
        ("phi-4", ["--api-key-secret", "a:b:c"], 2),
        ("phi-4", ["--memory", "20GB"], 2),
        ("phi-4", ["--gpu", "T4-16GB"], 6),
        ("llama-3.3-70b-instruct", [], 6),
        ("llama-3.3-70b-instruct", ["--quantize", "nf4"], 0),
        ("llama-3.3-70b-instruct", ["--gpus", "0"], 0),
    ],
)
def test_exit_status_says_whether_the_cluster_would_run_it(
    preset: str, flags: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workspace.yaml"
    file.write_text(SERVING.replace("PRESET", preset))
    assert main.run(["manifest", str(file), "--image", "image:1", *flags], {}) == status
    out, err = capsys.readouterr()
    assert bool(out) == (status == 0)  # nothing for kubectl to apply
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == (status != 0)


def test_wrong_manifest_is_refused_before_it_is_applied(tmp_path: Path) -> None:
    manifest = (ROOT / "examples/inference/kaito_workspace_phi_3_with_adapter.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(manifest.replace("\ninference:", "\ninfrence:"))
    done = CliRunner().invoke(app, ["manifest", str(tmp_path / "wrong.yaml"), "--image", "image:1"], obj={})
    assert "infrence" in str(done.exception)
