"""`runtime serve`: resolve the server, show it or run it.

Knows flags. Which settings they are lies in runtime/workspace. Start at `serve`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from runtime import oci, ports
from runtime.cli import render
from runtime.cli.options import (
    QUANTIZE,
    Debug,
    DryRun,
    KeyFile,
    KeyFrom,
    Quantize,
    RequireSignature,
    Set,
    api_keys,
    port_variable,
    set_flags,
    without_defaults,
)
from runtime.errors import ConfigError
from runtime.serving.settings import ServeConfig
from runtime.workspace import Resolved, load_server, references

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE|MODEL",
        help="A preset, a repository id, a model directory, or an inference Workspace manifest. "
        "Left out in a controller's pod, where the mounts describe the server.",
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
    typer.Option(
        min=0,
        max=65535,
        help=f"TCP port; the variable PORT, or {ports.SERVING}, by default; 0 takes a free one.",
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN",
        help="Let pages of this origin call the server from a browser, as in http://localhost:5173; * is "
        "every page. May be repeated.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A further name that a server on a loopback address answers to, behind a proxy that passes it "
        "on; * is every name. May be repeated.",
    ),
]
Combine = Annotated[
    bool | None,
    typer.Option(
        "--combine-adapters",
        help="Answer requests that name no adapter with all adapters combined, by their strengths.",
    ),
]
AdapterRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Allow loading adapters from this directory while serving; needs an API key."
    ),
]
AdapterSource = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter-source",
        metavar="REGISTRY/REPOSITORY",
        help="Load adapters below this folder of a registry as requests name them: model support:3 is "
        "REGISTRY/REPOSITORY/support:3. May be repeated.",
    ),
]
AdapterCache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the files of such adapters here; a temporary directory else."),
]
MaxAdapters = Annotated[
    int | None, typer.Option(min=1, help="Such adapters in memory at the same time; 32 by default.")
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Load the model, generate one token, report what would serve it, and exit."),
]
ServeAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run or --check: print JSON.")]
Parallel = Annotated[
    Literal["tp"] | None,
    typer.Option(help="Divide the model among processes, one per GPU (tensor parallelism)."),
]
Engine = Annotated[
    Literal["own", "vllm"] | None,
    typer.Option(help="Inference engine: this project's own, or vLLM where it is installed."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="With --parallel: number of processes; one per GPU by default.")
]
Replicas = Annotated[
    int | None,
    typer.Option(min=1, help="Copies of the model, each in a process and on a GPU of its own."),
]
Rows = Annotated[int | None, typer.Option(min=1, help="Sequences (requests) generated at the same time.")]
ContextTokens = Annotated[
    int | None, typer.Option(min=16, help="Most tokens of prompt and answer together, per request.")
]
SpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Most draft tokens for a lone request (prompt-lookup speculative decoding); 0 turns it off.",
    ),
]
ServedName = Annotated[str | None, typer.Option(help="The base model's name for clients.")]
Config = Annotated[
    Path | None, typer.Option(help="An inference_config.yaml, or a ConfigMap manifest that holds one.")
]


def serve(  # noqa: PLR0913, PLR0917 - a command line has as many parameters as flags
    context: typer.Context,
    target: Target = None,
    config: Config = None,
    adapter: Adapters = None,
    combine_adapters: Combine = None,
    adapter_root: AdapterRoot = None,
    adapter_source: AdapterSource = None,
    adapter_cache: AdapterCache = None,
    max_adapters: MaxAdapters = None,
    require_signature: RequireSignature = None,
    port: Port = None,
    host: Host = None,
    allow_origin: AllowOrigin = None,
    allow_host: AllowHost = None,
    quantize: Quantize = None,
    engine: Engine = None,
    parallel: Parallel = None,
    processes: Processes = None,
    replicas: Replicas = None,
    rows: Rows = None,
    context_tokens: ContextTokens = None,
    speculative_tokens: SpeculativeTokens = None,
    served_name: ServedName = None,
    api_key_env: KeyFrom = None,
    key_file: KeyFile = None,
    settings: Set = None,
    check: Check = False,
    dry_run: DryRun = False,
    as_json: ServeAsJson = False,
    debug: Debug = False,
) -> None:
    """Serve a model and its adapters: POST /chat and the OpenAI routes."""
    given, environ = dict(locals()), context.obj or {}
    resolved = load_server(target, environ=environ, config=config, overrides=_overrides(given, environ))
    _run(resolved, environ, dry_run=dry_run, check=check, as_json=as_json)


SETTING_OF = {
    "host": "host", "engine": "engine", "parallel": "parallel", "processes": "processes",
    "replicas": "replicas", "rows": "limits.rows", "context_tokens": "limits.context_tokens",
    "speculative_tokens": "speculative_tokens", "allow_host": "allowed_hosts",
    "allow_origin": "allowed_origins", "adapter": "--adapter", "adapter_root": "adapter_root",
    "adapter_source": "adapter_sources", "adapter_cache": "adapter_cache",
    "max_adapters": "adapter_limits.resident",
    "require_signature": "model.required_keys",
    "combine_adapters": "combine_adapters", "served_name": "served_name",
}  # fmt: skip
"""The setting that each parameter of `serve` stands for, of those whose value is taken as it is."""


def _overrides(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that the arguments of `serve` stand for."""
    flags = {setting: given[name] for name, setting in SETTING_OF.items()}
    flags |= api_keys(environ, given["api_key_env"], given["key_file"])
    flags["port"] = given["port"] if given["port"] is not None else port_variable(environ)
    return without_defaults(flags) | QUANTIZE.get(given["quantize"], {}) | set_flags(given["settings"])


def _run(
    resolved: Resolved[ServeConfig], environ: Mapping[str, str], *, dry_run: bool, check: bool, as_json: bool
) -> None:
    if dry_run:
        render.dry_run(resolved, render.server, as_json=as_json)
        return
    from runtime.serving.http import server

    resolved.warn()
    config, access = resolved.ready(), oci.from_environment(environ)
    references.check_adapters(config)
    if check:
        server.check_machine(config)
        server.key_file(config)
        access = server.required_access(config, access)
        _check(config, access, as_json=as_json)
    else:
        server.run(config, access=access)


def _check(config: ServeConfig, access: oci.Access, *, as_json: bool) -> None:
    """Load, generate one token and report what would serve; ConfigError when an adapter was refused."""
    from runtime.serving.check import check

    checked = check(config, access=access)
    facts = asdict(checked)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        facts["peak_memory_bytes"] = f"{checked.peak_memory_bytes / 2**30:.2f} GiB"
        render.table(("fact", "value"), [(name, render.cell(fact)) for name, fact in facts.items()])
    if checked.refused:
        raise ConfigError(f"refused: {', '.join(checked.refused)}; the log above says why")
