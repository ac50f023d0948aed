"""`runtime serve`: how its flags and variables reach the server."""

import inspect
import json
from pathlib import Path

import pytest

from runtime.cli import main, serve
from tests.cli.conftest import failure_line


def test_wrong_port_variable_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "phi-4"], {"PORT": "eighty"}) == 2
    assert "environment PORT is 'eighty'" in failure_line(capsys)


@pytest.mark.parametrize(
    ("environ", "flags", "port"),
    [({"PORT": "81"}, [], 81), ({"PORT": "81"}, ["--port", "82"], 82), ({}, [], 80)],
)
def test_port_comes_from_flag_then_variable(
    environ: dict[str, str], flags: list[str], port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["serve", "phi-4", "--dry-run", "--json", *flags], environ) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["port"]["value"] == port


def test_quantize_and_limits_reach_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "serve",
        "phi-4",
        "--quantize",
        "int8",
        "--rows",
        "3",
        "--served-name",
        "mine",
        "--dry-run",
        "--json",
    ]
    assert main.run(arguments, {}) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["quantization.bits"]["value"] == 8
    assert settings["limits.rows"]["value"] == 3
    assert settings["served_name"]["value"] == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter-root", "/x"], "adapter_root needs an API key"),
        (["--engine", "vllm", "--quantize", "int8"], "nf4 only"),
        (["--parallel", "tp", "--processes", "2", "--quantize", "nf4"], "divides whole weights"),
        (["--adapter", "a=MyAcr.azurecr.io/A:1"], "lower-case"),
        (["--adapter", "a=oci:/nowhere/layout"], "no OCI layout"),
        (["--adapter", "a=/nonexistent"], "--adapter a: no directory /nonexistent"),
        (["--adapter", "a=./nonexistent@0.5"], "--adapter a: no directory ./nonexistent"),
        (["--adapter", "a=~/nonexistent"], "--adapter a: no directory /"),
        (["--adapter", "a=outputs/nonexistent"], "an image is written registry/repository:tag"),
        (["--adapter", "a=nonexistent"], "an image is written registry/repository:tag"),
        (["--adapter", f"a={__file__}"], "is a file, expected the directory of an adapter"),
        (["--adapter", f"a={Path(__file__).parent}"], "holds no adapter"),
        (
            ["--adapter=a=r.io/a:1", "--adapter=a=r.io/b:1"],
            "two adapters of one name, from r.io/a:1 and r.io",
        ),
        (
            ["--adapter-source", "r.io/a:1"],
            "source 'r.io/a:1': expected registry/repository",
        ),
        (["--adapter-source", "adapters"], "expected registry/repository without a tag"),
        (["--adapter-source", "r.io/a", "--combine-adapters"], "leave adapter_sources out"),
        (["--adapter", "phi-4=r.io/a:1"], "two models are served as 'phi-4'"),
        (
            ["--set", "model.path=/nonexistent"],
            "flag --set model.path: no such file",
        ),
        (["--set", "model.image=https://r.io/x:1"], "without the scheme"),
    ],
)
def test_dry_run_refuses_what_the_server_would(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["serve", "phi-4", "--dry-run", *flags], {}) == 2
    assert message in failure_line(capsys)
    if "--engine" not in flags and "--adapter-root" not in flags and "--parallel" not in flags:
        return
    assert main.run(["serve", "phi-4", *flags], {}) == 2
    assert message in failure_line(capsys)


def test_adapter_sources_come_from_flags_files_and_the_environment(
    capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    def sources(*flags: str, environ: dict[str, str] | None = None) -> object:
        assert main.run(["serve", "phi-4", "--dry-run", "--json", *flags], environ or {}) == 0
        return json.loads(capsys.readouterr().out)["settings"]["adapter_sources"]["value"]

    (away / "mine.yaml").write_text("adapter_source: [r.io/file]\nmax_adapters: 8\n")
    environ = {"RUNTIME_ADAPTER_SOURCES": "r.io/one, r.io/two"}
    assert sources("--config", "mine.yaml") == ["r.io/file"]
    assert sources("--config", "mine.yaml", environ=environ) == ["r.io/one", "r.io/two"]
    flags = (
        "--adapter-source",
        "r.io/x",
        "--adapter-source",
        "r.io/y",
        "--set",
        "adapter_limits.cache_bytes=2Gi",
    )
    assert sources(*flags, environ=environ) == ["r.io/x", "r.io/y"]


def test_configuration_flag_wins_over_the_manifest(capsys: pytest.CaptureFixture[str], away: Path) -> None:
    (away / "mine.yaml").write_text("vllm: {max-model-len: 4096}\n")
    arguments = ["serve", "phi-4", "--config", "mine.yaml", "--dry-run", "--json"]
    assert main.run(arguments, {}) == 0
    setting = json.loads(capsys.readouterr().out)["settings"]["limits.context_tokens"]
    assert setting["value"] == 4096
    assert setting["source"].startswith("mine.yaml")


def test_occupied_port_is_one_line(capsys: pytest.CaptureFixture[str], away: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main.run(["serve", "phi-4", "--host", "127.0.0.1", "--port", str(port)], {}) == 2
    assert f"port {port} is in use" in failure_line(capsys)


@pytest.mark.parametrize("flag", ["--check", "--port=0"])
def test_a_server_without_a_temporary_directory_does_not_start(
    capsys: pytest.CaptureFixture[str], away: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(away / "none")])
    assert main.run(["serve", "phi-4", flag], {}) == 2
    assert "no temporary directory can be made" in failure_line(capsys)


def test_images_need_no_directory(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--adapter=a{number}={image}" for number, image in enumerate(IMAGES)]
    assert main.run(["serve", "phi-4", "--dry-run", "--json", *words], {}) == 0
    adapters = json.loads(capsys.readouterr().out)["settings"]["adapters"]["value"]
    assert [adapter["reference"] for adapter in adapters] == IMAGES


IMAGES = ["r.io/a", "localhost/a", "localhost:5000/a:1", "owner/a:1", "r.io/a@sha256:" + "0" * 64]


def test_context_beyond_the_model_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["serve", "phi-4", "--dry-run", "--context-tokens", "99999"], {}) == 0
    assert "limits.context_tokens is 99999, but phi-4 was made for 16384" in capsys.readouterr().out


WITH_FOLDER = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: w}
inference:
  preset: {name: phi-4}
  adapters: [{source: {name: a, volumeSource: {hostPath: {path: /nonexistent}}}}]
"""


def test_adapter_folder_of_a_manifest_is_looked_for_at_start_not_where_it_is_only_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "workspace.yaml"
    file.write_text(WITH_FOLDER)
    for words in (["serve", str(file), "--dry-run"], ["plan", str(file), "--gpu", "A100-80GB"]):
        assert main.run(words, {}) == 0
    capsys.readouterr()
    assert main.run(["serve", str(file), "--port", "0"], {}) == 2
    assert "adapter a: no directory /nonexistent" in failure_line(capsys)
    assert main.run(["serve", str(file), "--dry-run", "--adapter", "a=r.io/a:1"], {}) == 2
    assert "two adapters of one name, from /nonexistent and r.io/a:1" in failure_line(capsys)


def test_every_flag_is_carried_out() -> None:
    """One that `_overrides` leaves out would be dropped without a word."""
    of_the_command = {"context", "target", "config", "check", "dry_run", "as_json", "debug"}
    read_by_name = {"api_key_env", "key_file", "port", "quantize", "settings"}
    flags = set(inspect.signature(serve.serve).parameters) - of_the_command
    assert flags == set(serve.SETTING_OF) | read_by_name
