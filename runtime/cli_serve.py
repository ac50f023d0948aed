"""`runtime serve`: resolve the server, show it or run it.

Knows flags. What they mean lies in runtime/workspace. Start at `serve`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from pydantic import SecretStr

from runtime import cli_show, oci
from runtime.cli_tune import AsJson, Debug, DryRun, Set, ready, set_flags
from runtime.errors import ConfigError

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
    Literal["4bit", "8bit"] | None, typer.Option(help="Quantise the base weights with bitsandbytes.")
]
Rows = Annotated[int | None, typer.Option(min=1, help="Requests generated at the same time.")]
ContextTokens = Annotated[int | None, typer.Option(min=16, help="Prompt and answer together, per request.")]
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
    port: Port = None,
    host: Host = None,
    quantize: Quantize = None,
    rows: Rows = None,
    context_tokens: ContextTokens = None,
    served_name: ServedName = None,
    api_key_env: KeyFrom = None,
    settings: Set = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,  # read by cli.run, before anything else
) -> None:
    """Serve a model and its adapters: POST /chat and the OpenAI routes."""
    from runtime.workspace import load_serve

    named = {
        "host": host,
        "port": port if port is not None else port_variable(context.obj),
        "limits.rows": rows,
        "limits.context_tokens": context_tokens,
        "served_name": served_name,
        "quantization.bits": int(quantize[0]) if quantize else None,
        "api_key": api_key(context.obj, api_key_env),
        "--adapter": adapter,
    }
    overrides = {name: value for name, value in named.items() if value is not None}
    resolved = load_serve(target, environ=context.obj, overrides=overrides | set_flags(settings or []))
    if dry_run:
        cli_show.dry_run(resolved, cli_show.server, as_json=as_json)
        return
    config = ready(resolved)
    from runtime.serving import server

    server.run(config, access=oci.from_environment(context.obj or {}))


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
