"""`runtime serve`: how its flags and variables reach the server."""

import json
from pathlib import Path

import pytest

from runtime.cli import main
from tests.cli.conftest import failure_line

pytestmark = pytest.mark.usefixtures("restored_logging")


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
