"""`inference_api.py` of both runtimes that controllers know: their flags become one `ServeConfig`.

The server behind both is this project's own. A flag is honoured, or harmless (one log line says why), or
refused by name (vllm_flags.toml, transformers_flags.toml). Start at `transformers_server` and `vllm_server`.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime import logs, ports
from runtime.errors import ConfigError
from runtime.pod import flags, parent_environ
from runtime.pod.termination import exit_status_of
from runtime.serving.settings import ServeConfig
from runtime.tuning.process import failure
from runtime.workspace import Resolved, load_server, vllm_flags
from runtime.workspace.base_model import chat_template, read_dtype
from runtime.workspace.mounts import WEIGHTS, Mounts

log = logging.getLogger(__name__)

Flags = dict[str, str | None]
Resolve = Callable[[Sequence[str], Mapping[str, str], Path], Resolved[ServeConfig]]

COMMON_FLAGS = {"revision": "model.revision", "served_model_name": "served_name"}
TRANSFORMERS_FLAGS = Path(__file__).with_name("transformers_flags.toml")
SWITCHES = {"allow_remote_files", "load_in_4bit", "load_in_8bit"}
"""Flags of the transformers runtime that need no value."""


def main(
    resolve: Resolve, arguments: Sequence[str], environ: Mapping[str, str], *, root: Path = Path("/")
) -> int:
    """Serve, until SIGTERM, the config that `resolve` makes of the flags; return the exit status."""
    if {"--help", "-h"} & set(arguments):
        _print_flags(TRANSFORMERS_FLAGS if resolve is transformers_server else vllm_flags.TABLE)
        return 0
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")

    def serve() -> None:
        from runtime import oci
        from runtime.serving.http import server

        resolved = resolve(arguments, environ, root)
        resolved.warn()
        server.run(resolved.ready(), access=oci.from_environment(environ))

    return exit_status_of(serve, phase="serve", termination_log=failure.termination_log(root))


def transformers_server(
    arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")
) -> Resolved[ServeConfig]:
    """Return the server that the flags of /workspace/tfs/inference_api.py describe."""
    options = flags.read(arguments)
    _judge(options)
    pipeline = options.get("pipeline") or "text-generation"
    if pipeline not in ("text-generation", "conversational"):
        raise ConfigError(f"--pipeline is {pipeline!r}, expected text-generation or conversational")
    settings = _common(options, environ, root)
    settings["combine_adapters"] = True  # as KAITO's own runtime does: /chat answers with all of them
    dtype = read_dtype(options.get("torch_dtype") or "auto", "--torch_dtype")
    if dtype != "auto":
        settings["model.dtype"] = dtype
    for bits in (4, 8):
        if _is_true(options, f"load_in_{bits}bit"):
            settings["quantization.bits"] = bits
    target = _target(options.get("pretrained_model_name_or_path"))
    if target is not None and not _is_true(options, "allow_remote_files"):
        settings["model.local_files_only"] = True
    return load_server(target, environ=_with_strengths(environ, root), overrides=settings, root=root)


def vllm_server(
    arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")
) -> Resolved[ServeConfig]:
    """Return the server that the flags of /workspace/vllm/inference_api.py describe."""
    if role := environ.get("KAITO_INFERENCE_ROLE"):
        raise ConfigError(
            f"KAITO_INFERENCE_ROLE is {role!r}: prefill and decode run in one server here, not in pods of "
            "their own; use a Workspace, not a MultiRoleInference"
        )
    words = flags.parse(arguments, lists=vllm_flags.LISTS, short=vllm_flags.SHORT)
    if words.stray:
        raise ConfigError(f"unexpected {words.stray[0]!r}: expected flags, as in --max-model-len=4096")
    options: Flags = {"port": str(port(words.flags, environ))}
    if key := environ.get("VLLM_API_KEY"):
        options["api_key"] = key
    options |= words.flags
    _warn_of_download_folder(options.get("download_dir"))
    file = options.get("kaito_config_file")
    overrides = {
        "--adapter": [*_adapters_in(options.get("kaito_adapters_dir")), *_lora_modules(options)],
        "--vllm": options,
    }
    return load_server(
        _target(options.get("model")),
        environ=_with_strengths(environ, root),
        config=_config_file(file, root, environ) if file else None,
        overrides=overrides,
        root=root,
    )


def _config_file(path: str, root: Path, environ: Mapping[str, str]) -> Path:
    """Return the path of the configuration: in the pod, or from the working directory on."""
    return Mounts(root, environ).at(path) if Path(path).is_absolute() else Path(path)


def _adapters_in(folder: str | None) -> list[str]:
    """Return the adapters below a folder other than the one that is mounted by default."""
    if folder is None or Path(folder) == Path("/mnt/adapter"):
        return []
    found = sorted(file.parent for file in Path(folder).glob("*/adapter_config.json"))
    return [f"{adapter.name}={adapter}" for adapter in found]


def _lora_modules(options: Flags) -> list[str]:
    """Return the adapters of --lora-modules, written NAME=PATH or as JSON objects."""
    words = []
    for word in (options.get("lora_modules") or "").splitlines():
        if word.startswith("{"):
            try:
                entry = json.loads(word)
                word = f"{entry['name']}={entry['path']}"  # noqa: PLW2901 - the other way to write it
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"--lora-modules {word}: expected name and path") from None
        words.append(word)
    return words


def _warn_of_download_folder(folder: str | None) -> None:
    """Say where weights go when the folder for them, which inference_api.py sets, cannot be written."""
    if folder and not os.access(folder, os.W_OK):
        log.warning(
            "--download-dir %s is missing or cannot be written by user %s: weights go to the default cache",
            folder,
            os.geteuid(),
        )


def download_folder(arguments: Sequence[str]) -> str | None:
    """Return the directory of vLLM's --download-dir: a volume that outlives the container."""
    return flags.read(arguments).get("download_dir")


def port(options: Flags, environ: Mapping[str, str]) -> int:
    """Return the port to listen on: without a flag, the controller's port plus the local rank."""
    if options.get("port"):
        return _number(options["port"], "--port")
    return ports.CONTROLLER + _number(environ.get("LOCAL_RANK") or "0", "LOCAL_RANK")


def _common(options: Flags, environ: Mapping[str, str], root: Path) -> dict[str, Any]:
    """Return the settings that the flags of both runtimes share."""
    settings: dict[str, Any] = {"port": port(options, environ)}
    for flag, ours in COMMON_FLAGS.items():
        if options.get(flag):
            settings[ours] = options[flag]
    if settings.get("model.revision") == "main":
        del settings["model.revision"]
    template = options.get("chat_template")
    if template:
        settings["model.chat_template"] = chat_template(template, "--chat_template", Mounts(root, environ))
    return settings


def _with_strengths(environ: Mapping[str, str], root: Path) -> dict[str, str]:
    """Return the environment with the adapters' strengths, which a shell on the way may have dropped."""
    return parent_environ.restore(environ, [folder.name for folder in Mounts(root, environ).adapters()])


def _target(model: str | None) -> str | None:
    """Return the model to load, None where its weights are mounted in the pod."""
    return None if not model or model.rstrip("/") in WEIGHTS else model


def _is_true(options: Flags, flag: str) -> bool:
    """Whether a flag is given and true; ConfigError for a word that is neither true nor false."""
    if flag not in options:
        return False
    truth = flags.truth(options[flag])
    if truth is None:
        raise ConfigError(f"--{flag} is {options[flag]!r}, expected true or false")
    return truth


def _number(text: str | None, where: str) -> int:
    if text is None or not text.isdecimal():
        raise ConfigError(f"{where} is {text!r}, expected a whole number")
    return int(text)


def _judge(options: Flags) -> None:
    """Log flags without effect; ConfigError for the first that is unknown, refused or lacks a value."""
    known, harmless = vllm_flags.rules(TRANSFORMERS_FLAGS), dict[str, list[str]]()
    for name, value in options.items():
        rule = vllm_flags.judged(name, "true" if value is None else value, f"--{name}", known)
        if rule.treatment == "harmless":
            harmless.setdefault(rule.why, []).append(name)
        elif not value and name not in SWITCHES:
            raise ConfigError(f"--{name}: expected a value")
    if harmless:
        log.info("flags without effect here: %s", "; ".join(vllm_flags.phrases(harmless)))


def _print_flags(table: Path) -> None:
    rows = list(vllm_flags.table(table))
    print("usage: inference_api.py [--FLAG[=VALUE] ...]; the flags, and what becomes of each:")  # noqa: T201
    for flag, treatment, why in rows:
        print(f"  {flag:{max(len(row[0]) for row in rows)}}  {treatment:8}  {why}")  # noqa: T201
