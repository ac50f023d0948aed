"""`runtime serve`: resolve the server, show it or run it.

Knows flags. What they mean lies in runtime/workspace. Start at `serve`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import SecretStr

from runtime import oci
from runtime.cli import render
from runtime.cli.tune import AsJson, Debug, DryRun, Set, ready, set_flags
from runtime.errors import ConfigError
from runtime.serving.settings import ServeConfig

QUANTIZE: dict[str | None, dict[str, Any]] = {
    "nf4": {"quantization.bits": 4, "quantization.quant_type": "nf4"},
    "int8": {"quantization.bits": 8},
    "none": {"quantization": None},
}
"""The settings that `--quantize` stands for; "none" undoes what a manifest or a file asks for."""
KEY_VARIABLE = "RUNTIME_API_KEY"

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE|MODEL",
        help="A preset, a repository id, a model directory, or an inference Workspace manifest. "
        "Nothing in a controller's pod, where the mounts say it all.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=REF",
        help="Serve a LoRA adapter from a directory, oci:DIRECTORY[:tag] or registry/repository:tag; "
        "REF@0.5 halves its strength.",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="TCP port; PORT is the variable for it; 0 takes a free one."),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Quantize = Annotated[
    Literal["nf4", "int8", "none"] | None,
    typer.Option(help="Quantise the base weights with bitsandbytes: a quarter, or half, of 16 bit's memory."),
]
Combine = Annotated[
    bool | None,
    typer.Option(
        "--combine-adapters", help="Answer requests that name no adapter with all at once, by strength."
    ),
]
AdapterRoot = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Let adapters be loaded from here while serving; needs an API key."),
]
Check = Annotated[
    bool, typer.Option("--check", help="Load, generate one token, say what is served with, and end.")
]
Parallel = Annotated[
    Literal["tp"] | None,
    typer.Option(help="Divide the model among processes, one per GPU (tensor parallelism)."),
]
Engine = Annotated[
    Literal["own", "vllm"] | None,
    typer.Option(help="What generates: this project's own engine, or vLLM where that is installed."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="With --parallel: how many; one per GPU by default.")
]
Rows = Annotated[int | None, typer.Option(min=1, help="Requests generated at the same time.")]
ContextTokens = Annotated[int | None, typer.Option(min=16, help="Prompt and answer together, per request.")]
SpeculativeTokens = Annotated[
    int | None,
    typer.Option(min=0, help="Most tokens guessed ahead of a lone answer, from the text so far; 0: none."),
]
ServedName = Annotated[str | None, typer.Option(help="The base model's name for clients.")]
KeyFrom = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help="The API key is in this variable; RUNTIME_API_KEY otherwise.",
    ),
]


def serve(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target = None,
    adapter: Adapters = None,
    combine_adapters: Combine = None,
    adapter_root: AdapterRoot = None,
    port: Port = None,
    host: Host = None,
    quantize: Quantize = None,
    engine: Engine = None,
    parallel: Parallel = None,
    processes: Processes = None,
    rows: Rows = None,
    context_tokens: ContextTokens = None,
    speculative_tokens: SpeculativeTokens = None,
    served_name: ServedName = None,
    api_key_env: KeyFrom = None,
    settings: Set = None,
    check: Check = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,  # read by cli.run, before anything else
) -> None:
    """Serve a model and its adapters: POST /chat and the OpenAI routes."""
    from runtime.workspace import load_server

    named = {
        "host": host,
        "port": port if port is not None else port_variable(context.obj),
        "engine": engine,
        "parallel": parallel,
        "processes": processes,
        "limits.rows": rows,
        "limits.context_tokens": context_tokens,
        "speculative_tokens": speculative_tokens,
        "served_name": served_name,
        "combine_adapters": combine_adapters,
        "adapter_root": adapter_root,
        "api_key": api_key(context.obj, api_key_env),
        "--adapter": adapter,
    }
    overrides = {name: value for name, value in named.items() if value is not None}
    overrides |= QUANTIZE.get(quantize, {})
    resolved = load_server(target, environ=context.obj, overrides=overrides | set_flags(settings or []))
    if dry_run:
        render.dry_run(resolved, render.server, as_json=as_json)
        return
    config = ready(resolved)
    from runtime.serving.http import server

    access = oci.from_environment(context.obj or {})
    if check:
        _check(config, access, as_json=as_json)
    else:
        server.run(config, access=access)


def _check(config: ServeConfig, access: oci.Access, *, as_json: bool) -> None:
    """Load, generate one token and say what would serve; ConfigError when an adapter was refused."""
    from runtime.serving.check import check

    found = check(config, access=access)
    facts = asdict(found)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        facts["peak_memory_bytes"] = f"{found.peak_memory_bytes / 2**30:.2f} GiB"
        render.table(("fact", "value"), [(name, render.text(fact)) for name, fact in facts.items()])
    if found.refused:
        raise ConfigError(f"refused: {', '.join(found.refused)}; the log above says why")


def port_variable(environ: Mapping[str, str]) -> int | None:
    """Return the port that PORT asks for, as platforms set it."""
    text = environ.get("PORT", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"environment PORT is {text!r}, expected a number from 0 to 65535")
    return int(text)


def api_key(environ: Mapping[str, str], variable: str | None) -> SecretStr | None:
    """Return the key in `variable`, or in RUNTIME_API_KEY; ConfigError when a named one is not set."""
    key: Any = environ.get(variable or KEY_VARIABLE)
    if variable and not key:
        raise ConfigError(f"--api-key-env {variable}: this variable is not set, expected the key in it")
    return SecretStr(key) if key else None
