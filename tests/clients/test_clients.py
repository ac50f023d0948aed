"""The clients that people use, as they are released, against the real HTTP side over a scripted engine.

Each is one program in `programs/` that runs in an environment of its own (`make clients`) and prints what it
read as JSON. The engine says what follows "SAY:" in the last message.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Process

HERE = Path(__file__).parent
ENVIRONMENT = Path(sys.prefix) / "clients"
ODD_TEXT = "a\u2028b ünd 😀"
TOOLS = {"call": ["weather", {"city": "Oslo"}], "answer": "wet"}

pytestmark = [pytest.mark.slow]
needs_clients = pytest.mark.skipif(
    not (ENVIRONMENT / "bin/python").exists(), reason="needs the clients' environment: make clients"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """One server for all clients."""
    options = {"says": True, "engine": {"rows": 8, "queue": 16, "context_tokens": 4096}}
    site = Process.start([sys.executable, "-m", "tests.serving.fake_server", json.dumps(options)])
    try:
        site.wait_ready()
        yield site
    finally:
        site.close()


@pytest.fixture
def read(server: Process, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs a client's program and returns what it printed."""

    def run(command: str, program: str) -> Any:
        environ = {
            "PATH": f"{ENVIRONMENT}/bin:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "NO_PROXY": "*",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it asks a server of its makers at import
        }
        ran = subprocess.run(
            [str(ENVIRONMENT / "bin" / command), str(HERE / "programs" / program), server.url],
            capture_output=True,
            check=False,
            text=True,
            env=environ,
            timeout=240,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return json.loads(ran.stdout.strip().rpartition("\n")[2])

    return run


@needs_clients
def test_openai_for_python(read: Callable[..., Any]) -> None:
    answers = read("python", "openai_python.py")
    errors = answers.pop("errors")
    assert answers == {
        "models": ["base"],
        "chat": "ok",
        "responses": "ok",
        "completion": "ok",
        "stream": {"text": ODD_TEXT, "usage": True},
        "parsed": {"name": "Oslo", "people": 700000},
        "tools": {"finish": "tool_calls", **TOOLS},
        "agent": {"called": [["weather", {"city": city}] for city in ("Oslo", "Rome")], "answer": "wet"},
    }
    assert errors["model"][:2] == ["NotFoundError", "model_not_found"]
    assert errors["context"][:2] == ["BadRequestError", "context_length_exceeded"]
    assert errors["field"][0] == "BadRequestError"
    assert errors["field"][2] == "temperature"


@needs_clients
def test_openai_for_node(read: Callable[..., Any]) -> None:
    answers = read("node", "openai_node.mjs")
    errors = answers.pop("errors")
    assert answers == {
        "models": ["base"],
        "chat": "ok",
        "responses": "ok",
        "stream": {"text": ODD_TEXT, "usage": True},
        "tools": {"finish": "tool_calls", **TOOLS},
    }
    assert errors["model"][:2] == ["NotFoundError", "model_not_found"]
    assert errors["context"][:2] == ["BadRequestError", "context_length_exceeded"]
    assert errors["field"][2] == "temperature"


@needs_clients
def test_anthropic(read: Callable[..., Any]) -> None:
    assert read("python", "anthropic_python.py") == {
        "message": "ok",
        "stream": [ODD_TEXT, "end_turn", True],
        "count": True,
        "tools": {
            "called": [["weather", {"city": city}, "tool_use"] for city in ("Oslo", "Rome")],
            "answer": "wet",
        },
        "errors": {
            "model": ["NotFoundError", "not_found_error"],
            "context": ["BadRequestError", "invalid_request_error"],
            "field": ["BadRequestError", "invalid_request_error"],
        },
    }


@needs_clients
def test_langchain(read: Callable[..., Any]) -> None:
    city = {"name": "Oslo", "people": 700000}
    assert read("python", "langchain_python.py") == {
        "chat": "ok",
        "stream": {"text": ODD_TEXT},
        "tools": TOOLS,
        "json_schema": city,
        "function_calling": city,
    }


@needs_clients
def test_litellm(read: Callable[..., Any]) -> None:
    assert read("python", "litellm_python.py") == {
        "chat": "ok",
        "stream": {"text": ODD_TEXT},
        "tools": {"finish": "tool_calls", **TOOLS},
        "errors": {"model": "NotFoundError", "context": "ContextWindowExceededError"},
    }


@needs_clients
def test_llm_command(server: Process, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: base\n  api_base: {server.url}/v1\n  supports_schema: true\n"
    )
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "LLM_USER_PATH": str(tmp_path),
        "NO_PROXY": "*",
    }

    def llm(*words: str) -> str:
        command = [str(ENVIRONMENT / "bin/llm"), *words]
        ran = subprocess.run(command, capture_output=True, check=False, text=True, env=environ, timeout=240)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout.strip()

    assert llm("-m", "ours", "SAY:ok") == "ok"
    assert llm("-c", "SAY:and on") == "and on"
    said = '{"name": "Oslo", "people": 7}'
    assert json.loads(llm("-m", "ours", "--schema", "name, people int", "SAY:" + said))["people"] == 7


QUESTIONS = [
    {
        "question": f"What is {n} plus {n + 1}?",
        "choices": [str(2 * n + 1), "a word", "the answer " * (n + 1)],
        "answer": n % 3,
    }
    for n in range(10)
]
TASK = """
task: ten
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@needs_clients
def test_lm_evaluation_harness_scores_as_its_own_model_does(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "ten.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "ten.yaml").write_text(TASK.replace("FILE", str(rows)))
    (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
    program = [sys.executable, str(HERE / "programs/lm_eval_python.py")]  # with torch
    with closing(Process.serve(tiny_llama_dir, "--served-name", "tiny")) as site:
        site.wait_ready(240)
        ran = subprocess.run(
            [*program, site.url, str(tiny_llama_dir), str(tmp_path), str(packages)],
            capture_output=True,
            check=False,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NO_PROXY": "*", "HF_HUB_OFFLINE": "1"},
            timeout=480,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    own, served = (json.loads(ran.stdout.strip().rpartition("\n")[2])[side] for side in ("own", "served"))
    assert [len(row) for row in own["likelihoods"]] == [3] * 10
    for ours, theirs in zip(served["likelihoods"], own["likelihoods"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=0)
    assert (served["accuracy"], served["greedy"]) == (own["accuracy"], own["greedy"])
    assert any(re.search(r"Answered \w+-7:", line) for line in site.log), "eight prompts in one body"


@pytest.mark.skipif(shutil.which("java") is None, reason="needs a JDK")
def test_javas_default_client(server: Process) -> None:
    ran = subprocess.run(
        ["java", str(HERE / "programs/Chat.java"), server.url],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "NO_PROXY": "*"},
        timeout=120,
    )
    status, _, body = ran.stdout.partition(" ")
    assert status == "200", ran.stdout + ran.stderr
    assert json.loads(body)["choices"][0]["message"]["content"] == "ok"
