"""What to run once a job is done: serve the adapter, ask it something, merge it into its base model.

Knows flags of the other commands and a finished output folder; a test runs the lines as they are printed.
Start at `after_tuning`.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files import kind_of
from runtime.serving.settings import ADAPTER_NAME
from runtime.tuning.settings import TuningJob

PORT = 8000
"""Of the server in the printed commands; the default needs rights that few users have outside a container."""
LONGEST_QUESTION = 200

_KEPT = ("path", "revision", "trust_remote_code", "local_files_only")
"""Settings of the base model that a server must have too, where the job was given them."""


def after_tuning(job: TuningJob, report: Mapping[str, Any], *, with_question: bool) -> list[str]:
    """Return the commands that use the adapter of `job`, one a line.

    `with_question`: ask a question of the data, which may be private, rather than any.
    """
    folder = job.output.folder
    name = job.name if re.fullmatch(ADAPTER_NAME, job.name) else "tuned"
    address = f"http://127.0.0.1:{PORT}"
    serve = ["runtime", "serve", job.model.name, *_model_flags(job), "--adapter", f"{name}={folder}"]
    merge = ["runtime", "merge", str(folder), f"{folder}-merged"]
    if job.model.path is not None:
        merge += ["--model", job.model.name if kind_of(job.model.name) else str(job.model.path)]
    question = _question(report) if with_question else "Hello!"
    if _has_chat_template(folder):
        route, body = "/chat", {"prompt": question, "adapter": name}
    else:
        route, body = "/v1/completions", {"prompt": question, "model": name}
    ask = ["curl", "-sS", f"{address}{route}", "-d", json.dumps(body, ensure_ascii=False)]
    if route != "/chat":
        ask[2:2] = ["-H", "Content-Type: application/json"]
    serve += ["--host", "127.0.0.1", "--port", str(PORT)]
    return [shlex.join(command) for command in (serve, ask, merge)]


def _model_flags(job: TuningJob) -> list[str]:
    """Return the flags that read the base model as the job did, where its name alone does not."""
    flags = []
    for field in _KEPT:
        source = job.sources.get(f"model.{field}", "default")
        value = getattr(job.model, field)
        named_by_target = source in ("default", "command line") or source.startswith("preset ")
        if value and not named_by_target and str(value) != job.model.name:
            flags += ["--set", f"model.{field}={str(value).lower() if value is True else value}"]
    return flags


def _question(report: Mapping[str, Any]) -> str:
    for sample in report["result"]["samples"]:
        question = str(sample["question"])
        if len(question) <= LONGEST_QUESTION and question.isprintable():
            return question
    return "Hello!"


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    written = settings.read_text(encoding="utf-8") if settings.is_file() else ""
    return (folder / "chat_template.jinja").is_file() or '"chat_template"' in written
