"""What to run once a job is done: serve the adapter, ask it something, merge it into its base model.

Knows flags of the other commands and a finished output folder; a test runs the lines as they are printed.
Start at `after_tuning`.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files import kind_of
from runtime.serving.settings import ADAPTER_NAME
from runtime.tuning.arguments import lora
from runtime.tuning.settings import TuningJob

PORT = 8000
"""Of the server in the printed commands; the default needs rights that few users have outside a container."""
LONGEST_QUESTION = 200

_KEPT = ("path", "revision", "trust_remote_code", "local_files_only")
"""Settings of the base model that a server must have too, where the job was given them."""


def after_tuning(job: TuningJob, report: Mapping[str, Any], *, with_question: bool) -> list[str]:
    """Return the commands that use the adapter of `job`, one a line.

    An adapter that is not served is merged first, and the merged model served. One that cannot be merged
    either has no command. `with_question`: ask a question of the data, which may be private, rather than any.
    """
    merge = _merge(job)
    merged = merge[3]
    if not lora.unserved(job.lora):
        name = job.name if re.fullmatch(ADAPTER_NAME, job.name) else "tuned"
        serve = [job.model.name, *_model_flags(job), "--adapter", f"{name}={job.output.folder}"]
        commands = [_serve(serve), _ask(job, report, adapter=name, with_question=with_question), merge]
    elif lora.is_merged(job.lora):
        trusted = ["--set", "model.trust_remote_code=true"] if job.model.trust_remote_code else []
        ask = _ask(job, report, adapter=None, with_question=with_question)
        commands = [merge, _serve([merged, *trusted]), ask]
    else:
        commands = []
    return [shlex.join(command) for command in commands]


def _serve(words: Sequence[str]) -> list[str]:
    return ["runtime", "serve", *words, "--host", "127.0.0.1", "--port", str(PORT)]


def _merge(job: TuningJob) -> list[str]:
    folder = job.output.folder
    merge = ["runtime", "merge", str(folder), f"{folder}-merged"]
    if job.model.path is not None:
        merge += ["--model", job.model.name if kind_of(job.model.name) else str(job.model.path)]
    return merge


def _ask(job: TuningJob, report: Mapping[str, Any], *, adapter: str | None, with_question: bool) -> list[str]:
    """Return the request to the adapter, or to the model itself."""
    chat = _has_chat_template(job.output.folder)
    route, key = ("/chat", "adapter") if chat else ("/v1/completions", "model")
    body = {"prompt": _question(report) if with_question else "Hello!"} | ({key: adapter} if adapter else {})
    data = ["-d", json.dumps(body, ensure_ascii=False)]
    header = [] if chat else ["-H", "Content-Type: application/json"]
    return ["curl", "-sS", *header, f"http://127.0.0.1:{PORT}{route}", *data]


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
