"""/openapi.json says what the server does: schemathesis sends what it allows, and what it does not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_undescribed_answer(
    start_server: Any, tmp_path: Path
) -> None:
    """Fault 45. Values are read leniently ("3" is 3) and checked beyond types: those two checks are out."""
    server = start_server(engine={"rows": 8, "queue": 64})
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json"]
    options = ["--checks", checks, "-n", "12", "--seed", "1", "--phases", "fuzzing"]
    ran = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " generated" in ran.stdout
    assert server.running() == 0
