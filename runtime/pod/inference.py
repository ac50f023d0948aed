"""`inference_api.py` of both runtimes that controllers know: their flags become one `ServeConfig`.

The server behind both is this project's own. Controllers pass the flags of every engine, so those without
effect here are ignored, with one log line. Start at `transformers_server` and `vllm_server`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from runtime import logs, ports
from runtime.errors import ConfigError
from runtime.pod import flags, parent_environ
from runtime.pod.termination import exit_status_of
from runtime.serving.settings import ServeConfig
from runtime.tuning.process import failure
from runtime.workspace import Resolved, load_server
from runtime.workspace.base_model import chat_template
from runtime.workspace.mounts import WEIGHTS, Mounts

log = logging.getLogger(__name__)

Flags = dict[str, str | None]
Resolve = Callable[[Sequence[str], Mapping[str, str], Path], Resolved[ServeConfig]]

COMMON_FLAGS = {"revision": "model.revision", "served_model_name": "served_name"}
TRANSFORMERS_FLAGS = {
    "pretrained_model_name_or_path", "allow_remote_files", "pipeline", "torch_dtype", "chat_template",
    "load_in_4bit", "load_in_8bit", "port", "trust_remote_code", *COMMON_FLAGS,
}  # fmt: skip
VLLM_FLAGS = {
    "model", "code_revision", "download_dir", "max_model_len", "max_num_seqs", "dtype", "quantization",
    "port", "chat_template", "api_key", "kaito_adapters_dir", "kaito_config_file", "trust_remote_code",
    *COMMON_FLAGS,
}  # fmt: skip


def main(
    resolve: Resolve, arguments: Sequence[str], environ: Mapping[str, str], *, root: Path = Path("/")
) -> int:
    """Serve, until SIGTERM, the config that `resolve` makes of the flags; return the exit status."""
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
    _log_ignored(options, TRANSFORMERS_FLAGS)
    pipeline = options.get("pipeline") or "text-generation"
    if pipeline not in ("text-generation", "conversational"):
        raise ConfigError(f"--pipeline is {pipeline!r}, expected text-generation or conversational")
    settings = _common(options, environ, root)
    settings["combine_adapters"] = True  # as KAITO's own runtime does: /chat answers with all of them
    settings |= _dtype(options.get("torch_dtype"), "--torch_dtype")
    for bits in (4, 8):
        if f"load_in_{bits}bit" in options and flags.truth(options[f"load_in_{bits}bit"]):
            settings["quantization.bits"] = bits
    target = _target(options.get("pretrained_model_name_or_path"))
    allowed = "allow_remote_files" in options and flags.truth(options["allow_remote_files"])
    if target is not None and not allowed:
        settings["model.local_files_only"] = True
    return _resolve(target, environ, settings, root)


def vllm_server(
    arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")
) -> Resolved[ServeConfig]:
    """Return the server that the flags of /workspace/vllm/inference_api.py describe."""
    options = flags.read(arguments)
    _log_ignored(options, VLLM_FLAGS)
    settings = _common(options, environ, root)
    settings |= _dtype(options.get("dtype"), "--dtype")
    for name, ours in (("max_model_len", "limits.context_tokens"), ("max_num_seqs", "limits.rows")):
        if options.get(name) and options[name] != "auto":
            settings[ours] = _number(options[name], f"--{name.replace('_', '-')}")
    if options.get("quantization") == "bitsandbytes":
        settings["quantization.bits"] = 4
    key = options.get("api_key") or environ.get("VLLM_API_KEY")
    if key:
        settings["api_key"] = SecretStr(key)
    if options.get("code_revision"):
        settings.setdefault("model.revision", options["code_revision"])
    folder = Path(options.get("kaito_adapters_dir") or "/mnt/adapter")
    if folder != Path("/mnt/adapter"):
        adapters = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
        settings["--adapter"] = [f"{adapter.name}={adapter}" for adapter in adapters]
    return _resolve(_target(options.get("model")), environ, settings, root)


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


def _resolve(
    target: str | None, environ: Mapping[str, str], settings: Mapping[str, Any], root: Path
) -> Resolved[ServeConfig]:
    adapters = [folder.name for folder in Mounts(root, environ).adapters()]
    environ = parent_environ.restore(environ, adapters)  # with their strengths
    return load_server(target, environ=environ, overrides=settings, root=root)


def _target(model: str | None) -> str | None:
    """Return the model to load, None where its weights are mounted in the pod."""
    return None if model is None or model.rstrip("/") in WEIGHTS else model


def _dtype(written: str | None, flag: str) -> dict[str, Any]:
    """Return the compute type; KAITO's presets pass bfloat16 for every GPU, so the hardware decides then."""
    dtype = (written or "auto").removeprefix("torch.")
    if dtype in ("auto", "bfloat16"):
        return {}
    dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"{flag} is {written!r}, expected auto, bfloat16, float16 or float32")
    return {"model.dtype": dtype}


def _number(text: str | None, where: str) -> int:
    if text is None or not text.isdecimal():
        raise ConfigError(f"{where} is {text!r}, expected a whole number")
    return int(text)


def _log_ignored(options: Flags, known: set[str]) -> None:
    ignored = sorted(options.keys() - known)
    if "trust_remote_code" in options:
        ignored.append("trust_remote_code (models run on the library's own classes)")
    if ignored:
        log.info("ignored flags: %s", ", ".join(ignored))
