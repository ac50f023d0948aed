"""Options that several commands share, and how their values are read.

Does not know what a setting means. Start at `set_flags`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import SecretStr

from runtime.config import yaml_documents
from runtime.errors import ConfigError
from runtime.serving.settings import API_KEY_FILE_VARIABLE, API_KEY_VARIABLE

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what would run and where each setting comes from; run nothing."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunAsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")]
Config = Annotated[
    Path | None, typer.Option(help="A training_config.yaml, or a ConfigMap manifest that holds one.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, e.g. learning_rate=1e-4 or lora.r=8; docs/settings.md has those of tuning.",
    ),
]
QUANTIZE: dict[str | None, dict[str, Any]] = {
    "nf4": {"quantization.bits": 4, "quantization.quant_type": "nf4"},
    "int8": {"quantization.bits": 8},
    "none": {"quantization": None},
}
"""The settings that `--quantize` stands for; "none" undoes what a manifest or a file asks for."""
Quantize = Annotated[
    Literal["nf4", "int8", "none"] | None,
    typer.Option(
        help="Quantise the base weights with bitsandbytes, to a quarter (nf4) or half (int8) of 16 bits."
    ),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Training processes on this machine; one per GPU by default.")
]
KeyFrom = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="VARIABLE",
        help=f"Environment variable that holds the API key; {API_KEY_VARIABLE} by default.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="PATH",
        help="File with several API keys, each with a name and limits of its own (docs/keys.md); read again "
        f"when it changes. The variable {API_KEY_FILE_VARIABLE} by default.",
    ),
]
RequireSignature = Annotated[
    list[str] | None,
    typer.Option("--require-signature", metavar="PUBKEY", help="Take no image that this public key (PEM) has"
                 " not signed, or one of several such keys."),
]  # fmt: skip
Debug = Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")]
"""Read by main.run, before a command runs."""


def path(text: str) -> Path:
    """Return a path; an empty one, as an unset variable gives it, is refused: it would be this directory."""
    if not text:
        raise typer.BadParameter("is empty, expected a path")
    return Path(text)


def set_flags(words: list[str] | None) -> dict[str, Any]:
    """Return `KEY=VALUE` words as settings; a value is read as YAML, or kept as text where it is none."""
    settings: dict[str, Any] = {}
    for word in words or ():
        key, equals, text = word.partition("=")
        if not equals or not key.strip() or key.startswith("-"):
            raise ConfigError(f"--set {word}: expected KEY=VALUE, such as lora.r=8")
        try:
            settings[key.strip()] = yaml_documents(f"value: {text}", "--set")[0]["value"]
        except ConfigError:
            settings[key.strip()] = text
    return settings


def without_defaults(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that the user gave: all but None, False and lists of nothing."""
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    return {name: value for name, value in given.items() if value != []}


def port_variable(environ: Mapping[str, str]) -> int | None:
    """Return the port in the variable PORT, which hosting platforms set; None without it."""
    text = environ.get("PORT", "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"environment PORT is {text!r}, expected a number from 0 to 65535")
    return int(text)


def api_keys(environ: Mapping[str, str], variable: str | None, file: Path | None) -> dict[str, Any]:
    """Return the settings of one API key and of a file of them, by flags and variables."""
    if file is None and environ.get(API_KEY_FILE_VARIABLE):
        file = Path(environ[API_KEY_FILE_VARIABLE])
    return {"api_key": api_key(environ, variable), "api_key_file": file}


def api_key(environ: Mapping[str, str], variable: str | None) -> SecretStr | None:
    """Return the key in `variable`, or in RUNTIME_API_KEY; ConfigError when a named one is not set."""
    key: Any = environ.get(variable or API_KEY_VARIABLE)
    if variable and not key:
        raise ConfigError(f"--api-key-env {variable}: this variable is not set, expected the key in it")
    return SecretStr(key) if key else None
