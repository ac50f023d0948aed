"""The commands that `runtime tune` prints at its end: they work as they are printed."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from runtime.cli import next_steps
from runtime.model_source import ModelSource
from runtime.tuning.settings import Lora, Output, TuningJob

REPORT = {"result": {"samples": [{"question": "a\nb"}, {"question": "it's 3 o'clock?"}]}}


def job(folder: Path, **model: object) -> TuningJob:
    source = ModelSource(**{"name": "phi-4", **model})  # type: ignore[arg-type]
    sources = {f"model.{name}": "flag --set" for name in model}
    return TuningJob(name="my rows", model=source, output=Output(folder=folder), sources=sources)


def test_base_models_are_asked_to_complete_and_settings_of_the_model_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    asked = job(folder, trust_remote_code=True, path=tmp_path, revision=None)
    serve, ask, merge = next_steps.after_tuning(asked, REPORT, with_question=True)
    words = shlex.split(serve)
    assert words[:3] == ["runtime", "serve", "phi-4"]
    assert f"tuned={folder}" in words  # no adapter can be called "my rows"
    assert "model.trust_remote_code=true" in words
    assert f"model.path={tmp_path}" in words
    assert json.loads(shlex.split(ask)[-1]) == {"prompt": "it's 3 o'clock?", "model": "tuned"}
    assert "/v1/completions" in ask
    assert shlex.split(merge)[2:] == [str(folder), f"{folder}-merged", "--model", str(tmp_path)]


def test_data_is_not_shown_where_the_output_may_be_kept(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").touch()
    _, ask, _ = next_steps.after_tuning(job(tmp_path), REPORT, with_question=False)
    assert json.loads(shlex.split(ask)[-1]) == {"prompt": "Hello!", "adapter": "tuned"}


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environ(), capture_output=True, text=True, check=False
    )


def environ() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_printed_commands_work_as_printed(tiny_llama_dir: Path, tmp_path: Path) -> None:
    if is_taken(next_steps.PORT) or shutil.which("curl") is None:
        pytest.skip(f"port {next_steps.PORT} is taken, or curl is missing")
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = "--set max_steps=2 --set metrics_port=null --set train_test_split=1"
    tuned = run(f"runtime tune {tiny_llama_dir} --data sums.jsonl {flags}", tmp_path)
    assert tuned.returncode == 0, tuned.stderr
    assert "not measured: no rows are held out" in tuned.stderr
    serve, ask, merge = [line.strip() for line in tuned.stdout.splitlines() if line.startswith("  ")]
    with subprocess.Popen(shlex.split(serve), cwd=tmp_path, env=environ(), stderr=subprocess.PIPE) as server:
        try:
            merged = run(merge, tmp_path)
            assert merged.returncode == 0, merged.stderr
            assert (tmp_path / merged.stdout.strip() / "model.safetensors").is_file()
            wait_until_ready()
            answered = run(ask, tmp_path)
            assert "Result" in json.loads(answered.stdout), answered.stdout
        finally:
            server.terminate()
            server.communicate(timeout=60)


def wait_until_ready(seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{next_steps.PORT}/readyz", timeout=60).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    pytest.fail("the server was not ready")


def test_an_adapter_that_is_not_served_is_merged_first(tmp_path: Path) -> None:
    dora = job(tmp_path).model_copy(update={"lora": Lora(options={"use_dora": True})})
    merge, serve, ask = next_steps.after_tuning(dora, REPORT, with_question=False)
    assert shlex.split(merge)[:4] == ["runtime", "merge", str(tmp_path), f"{tmp_path}-merged"]
    assert shlex.split(serve)[:3] == ["runtime", "serve", f"{tmp_path}-merged"]
    assert "--adapter" not in serve
    assert json.loads(shlex.split(ask)[-1]) == {"prompt": "Hello!"}
    neither = job(tmp_path).model_copy(update={"lora": Lora(options={"alora_invocation_tokens": [1]})})
    assert next_steps.after_tuning(neither, REPORT, with_question=False) == []
