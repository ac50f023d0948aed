"""`inference_api.py`, of both runtimes that controllers know: their flags become one `ServeConfig`.

The server behind both is this project's own. Flags that it has no use for are named once and dropped: the
controllers send every engine's. Start at `transformers_server` and `vllm_server`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from runtime import logs, ports
from runtime.errors import ConfigError
from runtime.pod import ancestors, flags
from runtime.pod.ending import status_of
from runtime.serving.settings import ServeConfig
from runtime.tuning.process import failure
from runtime.workspace import Resolved, load_server
from runtime.workspace.base_model import chat_template
from runtime.workspace.mounts import WEIGHTS, Mounts

log = logging.getLogger(__name__)

Flags = dict[str, str | None]
Resolve = Callable[[Sequence[str], Mapping[str, str], Path], Resolved[ServeConfig]]

COMMON = {"revision": "model.revision", "served_model_name": "served_name"}
TRANSFORMERS = {
    "pretrained_model_name_or_path", "allow_remote_files", "pipeline", "torch_dtype", "chat_template",
    "load_in_4bit", "load_in_8bit", "port", "trust_remote_code", *COMMON,
}  # fmt: skip
VLLM = {
    "model", "code_revision", "download_dir", "max_model_len", "max_num_seqs", "dtype", "quantization",
    "port", "chat_template", "api_key", "kaito_adapters_dir", "kaito_config_file", "trust_remote_code",
    *COMMON,
}  # fmt: skip


def main(
    resolve: Resolve, arguments: Sequence[str], environ: Mapping[str, str], *, root: Path = Path("/")
) -> int:
    """Serve what `resolve` makes of the flags until SIGTERM; return the exit status."""
    logs.configure(debug=environ.get("DEBUG_MODE", "").lower() == "true")

    def serve() -> None:
        from runtime import oci
        from runtime.serving.http import server

        resolved = resolve(arguments, environ, root)
        resolved.warn()
        server.run(resolved.ready(), access=oci.from_environment(environ))

    place = failure.termination_log(root)
    return status_of(serve, phase="serve", termination_log=place)


def transformers_server(
    arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")
) -> Resolved[ServeConfig]:
    """Return the server that the flags of /workspace/tfs/inference_api.py describe."""
    given = flags.read(arguments)
    _say_what_is_dropped(given, TRANSFORMERS)
    pipeline = given.get("pipeline") or "text-generation"
    if pipeline not in ("text-generation", "conversational"):
        raise ConfigError(f"--pipeline is {pipeline!r}, expected text-generation or conversational")
    settings = _common(given, environ, root)
    settings["combine_adapters"] = True  # what this runtime's users know: /chat answers with them
    settings |= _dtype(given.get("torch_dtype"), "--torch_dtype")
    for bits in (4, 8):
        if f"load_in_{bits}bit" in given and flags.truth(given[f"load_in_{bits}bit"]):
            settings["quantization.bits"] = bits
    target = _target(given.get("pretrained_model_name_or_path"))
    allowed = "allow_remote_files" in given and flags.truth(given["allow_remote_files"])
    if target is not None and not allowed:
        settings["model.local_files_only"] = True
    return _resolve(target, environ, settings, root)


def vllm_server(
    arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")
) -> Resolved[ServeConfig]:
    """Return the server that the flags of /workspace/vllm/inference_api.py describe."""
    given = flags.read(arguments)
    _say_what_is_dropped(given, VLLM)
    settings = _common(given, environ, root)
    settings |= _dtype(given.get("dtype"), "--dtype")
    for name, ours in (("max_model_len", "limits.context_tokens"), ("max_num_seqs", "limits.rows")):
        if given.get(name) and given[name] != "auto":
            settings[ours] = _number(given[name], f"--{name.replace('_', '-')}")
    if given.get("quantization") == "bitsandbytes":
        settings["quantization.bits"] = 4
    key = given.get("api_key") or environ.get("VLLM_API_KEY")
    if key:
        settings["api_key"] = SecretStr(key)
    if given.get("code_revision"):
        settings.setdefault("model.revision", given["code_revision"])
    folder = Path(given.get("kaito_adapters_dir") or "/mnt/adapter")
    if folder != Path("/mnt/adapter"):
        found = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
        settings["--adapter"] = [f"{adapter.name}={adapter}" for adapter in found]
    return _resolve(_target(given.get("model")), environ, settings, root)


def download_folder(arguments: Sequence[str]) -> str | None:
    """Return the directory that vLLM's --download-dir names: a volume that outlives the container."""
    return flags.read(arguments).get("download_dir")


def port(given: Flags, environ: Mapping[str, str]) -> int:
    """Return the port to listen on; every local rank has its own, from the controller's upwards."""
    if given.get("port"):
        return _number(given["port"], "--port")
    return ports.CONTROLLER + _number(environ.get("LOCAL_RANK") or "0", "LOCAL_RANK")


def _common(given: Flags, environ: Mapping[str, str], root: Path) -> dict[str, Any]:
    """Return the settings that the flags of both runtimes share."""
    settings: dict[str, Any] = {"port": port(given, environ)}
    for flag, ours in COMMON.items():
        if given.get(flag):
            settings[ours] = given[flag]
    if settings.get("model.revision") == "main":
        del settings["model.revision"]
    template = given.get("chat_template")
    if template:
        settings["model.chat_template"] = chat_template(template, "--chat_template", Mounts(root, environ))
    return settings


def _resolve(
    target: str | None, environ: Mapping[str, str], settings: Mapping[str, Any], root: Path
) -> Resolved[ServeConfig]:
    adapters = [folder.name for folder in Mounts(root, environ).adapters()]
    return load_server(target, environ=ancestors.recover(environ, adapters), overrides=settings, root=root)


def _target(named: str | None) -> str | None:
    """Return the model to load, None where its weights are mounted in the pod."""
    return None if named is None or named.rstrip("/") in WEIGHTS else named


def _dtype(written: str | None, flag: str) -> dict[str, Any]:
    """Return the compute type; bfloat16 is what presets say of every GPU, so it is left to the hardware."""
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


def _say_what_is_dropped(given: Flags, known: set[str]) -> None:
    dropped = sorted(given.keys() - known)
    if "trust_remote_code" in given:
        dropped.append("trust_remote_code (models run on the library's own classes)")
    if dropped:
        log.info("flags without meaning here: %s", ", ".join(dropped))
