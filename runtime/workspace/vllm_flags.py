"""The flags of vLLM's server that controllers and inference_config.yaml pass, and what becomes of each here.

A flag is honoured, harmless (it tunes vLLM's own machinery, and answers are the same without it) or refused
by name, because the answers or the place they come from would differ. A flag that is none of these is
refused too, as vLLM does. Names are vLLM 0.25's and KAITO's. Start at `apply`; docs/kaito.md shows the table.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from runtime.config import nearest
from runtime.errors import ConfigError
from runtime.serving.answer_parsers.formats import CALLS, REASONING
from runtime.workspace.base_model import read_dtype
from runtime.workspace.layers import LayeredSettings

TABLE = Path(__file__).with_suffix(".toml")
SHORT = {
    "tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size",
    "q": "quantization", "O": "optimization_level", "cc": "compilation_config", "sc": "speculative_config",
    "n": "nnodes", "r": "node_rank",
}  # fmt: skip
LISTS = frozenset({"served_model_name", "lora_modules", "adapter_source"})
"""Flags that take several words."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a flag, and why."""

    treatment: str
    """"honoured", "harmless" or "refused"."""
    why: str
    neutral: frozenset[str]
    """Values of a refused flag that ask for nothing, in lower case."""


@cache
def rules(file: Path = TABLE) -> dict[str, Rule]:
    """Return the rule of every flag in a file of this form, by its name with underscores."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))["rule"]
    return {
        name: Rule(table["treatment"], table["why"], frozenset(table.get("pass", "").split()))
        for table in tables
        for name in table["flags"].split()
    }


Put = Callable[[LayeredSettings, str, str], None]
"""Lays a value over the settings; the last argument says where it is written."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What is left of the flags once their settings are made."""

    files: dict[str, str]
    """Flags that name models, files and folders, for the caller to open."""
    harmless: tuple[str, ...]
    """Flags without effect, and why, one phrase each."""


def apply(settings: LayeredSettings, flags: Mapping[str, Any], where: str = "") -> Applied:
    """Lay the honoured flags over `settings`; `where` is the file and section they stand in, "" for flags.

    Raises ConfigError for the first that is unknown or refused, or whose value is none.
    """
    files: dict[str, str] = {}
    harmless: dict[str, list[str]] = {}
    for written, value in flags.items():
        name, text = _canonical(written, value)
        shown = f"{where}{written}" if where else f"--{name.replace('_', '-')}"
        rule = judged(name, text, shown, rules())
        if rule.treatment == "harmless":
            harmless.setdefault(rule.why, []).append(str(written))
        if rule.treatment != "honoured":
            continue
        if (value is None and name not in _SWITCHES) or (not text and name not in _MAY_BE_EMPTY):
            raise ConfigError(f"{shown}: expected a value")
        if name in _HONOURED:
            _HONOURED[name](settings, text, shown)
        else:
            files[name] = text
    return Applied(files, phrases(harmless))


def judged(name: str, text: str, shown: str, known: Mapping[str, Rule]) -> Rule:
    """Return the rule of a flag; ConfigError, which calls it `shown`, where it is unknown or refused."""
    rule = known.get(name)
    if rule is None:
        raise ConfigError(f"{shown}: unknown flag{nearest(name, known)}")
    if rule.treatment == "refused" and text.lower() not in rule.neutral:
        asked = f"{shown} is {text!r}, which" if _is_plain(name, text) else shown
        raise ConfigError(f"{asked} is not served here: {rule.why}")
    return rule


def phrases(harmless: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return one phrase for each reason why flags have no effect."""
    return tuple(f"{', '.join(names)}: {why}" for why, names in harmless.items())


def _is_plain(name: str, text: str) -> bool:
    """Whether a value may be shown: a word or number, no JSON, path or token that may hold a secret."""
    return "token" not in name and re.fullmatch(r"[\w.]{1,20}", text) is not None


def token_count(text: str, where: str) -> int | None:
    """Return a count as vLLM writes it ("4096", "32k", "1.5K"), None for "auto" and -1."""
    if text in ("auto", "-1"):
        return None
    found = _SIZE.fullmatch(text)
    count = float(found[1]) * _SIZES[found[2]] if found else 0.5
    if count != int(count) or count < 1:
        raise ConfigError(
            f"{where} is {text!r}, expected a number of tokens, as in 4096, 32k or 1.5K, or auto"
        )
    return int(count)


def table(file: Path = TABLE) -> Iterable[tuple[str, str, str]]:
    """Yield (flag, treatment, why) for every flag, in the order of the rules."""
    for name, rule in rules(file).items():
        allowed = f" ({', '.join(sorted(rule.neutral))}: taken)" if rule.neutral else ""
        yield f"--{name.replace('_', '-') if file == TABLE else name}", rule.treatment, rule.why + allowed


def _canonical(written: str, value: Any) -> tuple[str, str]:
    """Return the flag's name and its value as text: `no-x` is x=false, `x.y=…` is a part of x."""
    name = str(written).replace("-", "_").partition(".")[0]
    text = "true" if value is None or value is True else str(value)
    if isinstance(value, list):
        text = "\n".join(map(str, value))
    if name not in rules() and name.removeprefix("no_") in rules():
        return name.removeprefix("no_"), "false"
    return name, text


def _number(name: str, least: int = 1) -> Put:
    def put(settings: LayeredSettings, text: str, where: str) -> None:
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(f"{where} is {text!r}, expected a whole number of at least {least}")
        settings.put(name, int(text), where)

    return put


def _text(name: str) -> Put:
    return lambda settings, text, where: settings.put(name, text, where)


def _revision(settings: LayeredSettings, text: str, where: str) -> None:
    if text != "main":  # the branch that is taken anyway
        settings.put("model.revision", text, where)


def _code_revision(settings: LayeredSettings, text: str, where: str) -> None:
    if settings.get("model.revision") is None:
        _revision(settings, text, where)


def _context(settings: LayeredSettings, text: str, where: str) -> None:
    tokens = token_count(text, where)
    if tokens is not None:
        settings.put("limits.context_tokens", tokens, where)


def _memory_share(settings: LayeredSettings, text: str, where: str) -> None:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{where} is {text!r}, expected a number above 0, and 1 at most")
    settings.put("limits.gpu_memory_share", share, where)


def _names(settings: LayeredSettings, text: str, where: str) -> None:
    name, *aliases = text.splitlines()
    settings.put("served_name", name, where)
    settings.put("served_aliases", tuple(aliases), where)


def _dtype(settings: LayeredSettings, text: str, where: str) -> None:
    dtype = read_dtype(text, where)
    if dtype != "auto":
        settings.put("model.dtype", dtype, where)


def _quantization(settings: LayeredSettings, text: str, where: str) -> None:
    if text.lower() == "none":
        return
    if text != "bitsandbytes":
        raise ConfigError(
            f"{where} is {text!r}, expected bitsandbytes; weights that are stored quantised say so themselves"
        )
    settings.put("quantization.bits", 4, where)


def _tensor_parallel(settings: LayeredSettings, text: str, where: str) -> None:
    if text == "1":
        return
    _number("processes")(settings, text, where)
    settings.put("parallel", "tp", where)


def _data_parallel(settings: LayeredSettings, text: str, where: str) -> None:
    _number("replicas")(settings, text, where)


def _tool_parser(settings: LayeredSettings, text: str, where: str) -> None:
    settings.put("tool_call_parser", text, where)
    if text not in CALLS:
        settings.warn(
            f"{where} {text}: this format of function calls is not known here, requests with tools are "
            f"refused; known: {', '.join(sorted(CALLS))}"
        )


def _reasoning_parser(settings: LayeredSettings, text: str, where: str) -> None:
    settings.put("reasoning_parser", text, where)
    if text not in REASONING:
        settings.warn(
            f"{where} {text}: this format of reasoning is not known here, what the chat template shows "
            f"decides; known: {', '.join(sorted(REASONING))}"
        )


def _allowed_origins(settings: LayeredSettings, text: str, where: str) -> None:
    """A list in a file, and the JSON of one on a command line."""
    origins: Any = text.splitlines() if text.lower() != "none" else []
    if text.startswith("["):
        try:
            origins = json.loads(text)
        except ValueError:
            origins = None
        if not isinstance(origins, list):
            raise ConfigError(f'{where}: expected a list in JSON, as in ["https://chat.example.com"]')
    if origins:
        settings.put("allowed_origins", tuple(origins), where)


def _adapter_sources(settings: LayeredSettings, text: str, where: str) -> None:
    settings.put("adapter_sources", tuple(text.splitlines()), where)


def _enable_lora(settings: LayeredSettings, text: str, where: str) -> None:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"{where} is {text!r}, expected true or false")
    if text.lower() == "false":
        settings.warn(f"{where} is false: adapters that are mounted are served all the same")


def _api_key(settings: LayeredSettings, text: str, where: str) -> None:
    if "\n" in text:
        raise ConfigError(f"{where}: several keys, expected one")
    settings.put("api_key", SecretStr(text), where)


_HONOURED: dict[str, Put] = {
    "revision": _revision,
    "code_revision": _code_revision,
    "served_model_name": _names,
    "dtype": _dtype,
    "quantization": _quantization,
    "host": _text("host"),
    "port": _number("port"),
    "api_key": _api_key,
    "allowed_origins": _allowed_origins,
    "shutdown_timeout": _number("drain_timeout_s", least=0),
    "max_model_len": _context,
    "max_num_seqs": _number("limits.rows"),
    "gpu_memory_utilization": _memory_share,
    "tensor_parallel_size": _tensor_parallel,
    "data_parallel_size": _data_parallel,
    "tool_call_parser": _tool_parser,
    "reasoning_parser": _reasoning_parser,
    "enable_lora": _enable_lora,
    "max_lora_rank": _number("max_lora_rank"),
    "adapter_source": _adapter_sources,
    "adapter_cache": _text("adapter_cache"),
    "max_adapters": _number("adapter_limits.resident"),
}
"""Those that are settings; the others name models, files and folders."""
_SWITCHES = frozenset({"enable_lora"})
"""Flags that need no value."""
_MAY_BE_EMPTY = frozenset({"kaito_config_file"})
