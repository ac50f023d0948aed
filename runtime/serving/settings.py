"""What a server is: everything `app.create_app` and the engine need, resolved and checked.

Does not know KAITO's schema (runtime/workspace/ turns a Workspace into this), the environment or
torch.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from runtime import ports
from runtime.config import Strict
from runtime.errors import ConfigError
from runtime.model_source import ModelSource, Quantization
from runtime.quantities import read_bytes

API_KEY_VARIABLE = "RUNTIME_API_KEY"
"""Environment variable with the API key, where no other one is named."""
API_KEY_FILE_VARIABLE = "RUNTIME_API_KEY_FILE"
"""Environment variable with the path of the file of keys, where no flag has it."""
ADAPTER_SOURCES_VARIABLE = "RUNTIME_ADAPTER_SOURCES"
"""Environment variable with `adapter_sources`, separated by commas, where no flag states them."""
SOURCED_RANK = 64
"""Largest rank of an adapter from `adapter_sources` where `max_lora_rank` is not stated."""
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"


_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _origin(text: str) -> str:
    """Return an origin as browsers write it, `*` as it is."""
    found = _ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if text == "*":
        return text
    if found is None:
        raise ValueError(
            "expected the scheme, host and port of a page, as in https://chat.example.com or "
            "http://localhost:5173 (other than ASCII as punycode), or * for all pages"
        )
    scheme, host, port = found.groups("")
    return f"{scheme}://{host}{'' if port == _DEFAULT_PORTS.get(scheme) else port}"


class AdapterSource(Strict):
    """One LoRA adapter to serve beside the base model."""

    name: str = Field(pattern=ADAPTER_NAME)
    """The name clients select it by."""
    reference: str
    """A directory, `oci:DIRECTORY[:tag]` (a layout on disk), or `registry/repository:tag`."""
    strength: float = Field(1.0, ge=0, le=1)
    """Multiplies the adapter's update; 1 is as trained."""


CPU_ROWS = 32
"""Sequences at the same time on a CPU: more make every answer slower and none of them sooner."""


class Limits(Strict):
    """Limits of one request, and of all requests together."""

    rows: int = Field(256, ge=1)
    """Most sequences (answers) at the same time, of each copy of the model; on a CPU 32 if none is stated."""
    queue: int = Field(64, ge=0)
    """Requests waiting to be generated, for each copy of the model; one more is answered 429."""
    context_tokens: int | None = Field(None, ge=16)
    """Prompt and answer together, per request; None takes what the model and the memory allow."""
    gpu_memory_share: float | None = Field(None, gt=0, le=1)
    """Largest part of a GPU's memory in use, by whatever process; None takes what is free."""
    new_tokens: int = Field(512, ge=1)
    """Answer length when the request states none."""
    connections: int | None = Field(None, ge=1)
    """Open connections; for a new one the longest idle one is closed. None is 4,096, or fewer where the
    process may open fewer files."""
    header_bytes: int = Field(64 << 10, ge=1024)
    """Largest request line and headers together."""
    header_fields: int = Field(100, ge=1)
    """Most header fields of a request."""
    body_bytes: int = Field(4 << 20, ge=1024)
    """Largest request body, as sent and decompressed."""
    bodies_bytes: int = Field(256 << 20, ge=1024)
    """Bodies that are arriving at one time, of all clients together; one that exceeds it is answered 429."""
    header_timeout_s: float = Field(15.0, gt=0)
    """From the connection, or a further request's first byte on it, to the end of the headers."""
    body_timeout_s: float = Field(30.0, gt=0)
    """From the end of the headers to the end of the body."""
    write_timeout_s: float = Field(30.0, gt=0)
    """Longest time in which a client takes nothing of an answer that waits for it."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Longest time from the request's arrival to its last token."""

    def rows_on(self, device: str) -> int:
        """Return `rows` for a device: where none are stated, a CPU gains nothing from more than CPU_ROWS."""
        return (
            min(self.rows, CPU_ROWS) if device == "cpu" and "rows" not in self.model_fields_set else self.rows
        )


Bytes = Annotated[int, BeforeValidator(read_bytes)]
"""A number, or a quantity such as 20Gi."""


class AdapterLimits(Strict):
    """Limits of adapters that requests name and a registry holds."""

    resident: int = Field(32, ge=1)
    """Adapters in memory at one time, beside those that are configured; one in use never leaves."""
    cache_bytes: Bytes = 20 << 30
    """Files of adapters that are kept on disk; those that nobody asked for the longest leave."""
    image_bytes: Bytes = 4 << 30
    """Largest adapter, as the registry holds it and unpacked."""
    pulls: int = Field(4, ge=1)
    """Adapters pulled at one time."""
    waiting: int = Field(64, ge=0)
    """Requests that wait for adapters; one more is answered 429."""
    wait_s: float = Field(60.0, gt=0)
    """Longest time a request waits for its adapter, which is pulled all the same."""
    pull_s: float = Field(600.0, gt=0)
    """Longest time a pull takes."""
    refresh_s: float = Field(60.0, gt=0)
    """Age from which a tag is looked up again with the next request for it."""


class Vllm(Strict):
    """How vLLM is run where it is the engine."""

    program: str = "vllm"
    """Its command, on PATH or a path: usually that of a virtual environment of its own."""
    flags: dict[str, Any] = {}
    """More of its flags, by their names without dashes; they take precedence over those that are set here."""


class ServeConfig(Strict):
    """The configuration of one server."""

    model: ModelSource
    served_name: str
    """The base model's name in /v1/models and in answers."""
    served_aliases: tuple[str, ...] = ()
    """Further names that requests may call the base model by."""
    adapters: tuple[AdapterSource, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    """Registries' folders, `registry/repository`, below which requests may name adapters: NAME[:TAG]."""
    adapter_cache: Path | None = None
    """Directory that keeps their files; None is a temporary one."""
    adapter_limits: AdapterLimits = AdapterLimits()
    combine_adapters: bool = False
    """Answer requests that name no adapter with all of them, weighted by strength, as KAITO does."""
    max_lora_rank: int | None = Field(None, ge=1)
    """Largest rank of an adapter; one of a larger rank is not loaded. None is any, and 64 with vLLM, which
    reserves memory for it, and for those of `adapter_sources`."""
    quantization: Quantization | None = None
    """bitsandbytes quantisation of the base weights; None serves them as they are."""
    tool_call_parser: str | None = None
    """vLLM's name of the form in which the model writes function calls; a name that is not known here
    refuses tools. None finds every known form."""
    reasoning_parser: str | None = None
    """vLLM's name of the form in which the model writes its reasoning; none is known here."""
    replicas: int = Field(1, ge=1)
    """Copies of the model, each in a process and on a GPU of its own; on a CPU they share its cores."""
    speculative_tokens: int = Field(16, ge=0)
    """Most draft tokens per step of a lone sequence, from its own text (own engine); 0 turns drafts off."""
    cuda_graphs: bool = True
    """Capture decode steps on a GPU as CUDA graphs (own engine); false launches each operation by itself."""
    engine: Literal["own", "vllm"] = "own"
    """The engine: this project's own, or a vLLM that it starts and stops."""
    vllm: Vllm = Vllm()
    parallel: Literal["tp"] | None = None
    """Divide the model among processes, one per GPU: "tp" is tensor parallelism."""
    processes: int | None = Field(None, ge=1)
    """Processes that share the model, on this machine; None is one per visible GPU."""
    host: str = "0.0.0.0"  # noqa: S104 - a pod must be reachable
    port: int = Field(ports.SERVING, ge=0, le=65535)
    """TCP port; 0 takes a free one and logs it."""
    allowed_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Origins whose pages may call this server from a browser; `*` is all. Its own page always may."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9._-]+)$")], ...] = ()
    """Names that a server on a loopback address answers to besides localhost; `*` is all. Behind a proxy that
    passes the name of its own on."""
    limits: Limits = Limits()
    api_key: SecretStr | None = None
    """Bearer token that every route except health and metrics then requires."""
    api_key_file: Path | None = None
    """File of several keys, each with its name and limits, read again when it changes; docs/keys.md."""
    adapter_root: Path | None = None
    """Directory from which adapters may be loaded while serving; needs an API key. None allows none."""
    drain_delay_s: float = Field(0.0, ge=0)
    """Time after SIGTERM in which requests are still accepted while /readyz already answers 503."""
    drain_timeout_s: float = Field(25.0, ge=0)
    """Time from then to the exit. Answers in flight have it to finish, less at most 5 s for closing."""


def check(config: ServeConfig) -> None:
    """Raise ConfigError for settings that do not go together: before a dry run ends, or a server starts."""
    quantization, limits = config.quantization, config.limits
    names = [config.served_name, *config.served_aliases, *(adapter.name for adapter in config.adapters)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two models are served as {twice!r}: base model and adapters need different names")
    if limits.bodies_bytes < limits.body_bytes:
        raise ConfigError(
            f"limits.bodies_bytes is {limits.bodies_bytes}, which one body of limits.body_bytes "
            f"({limits.body_bytes}) exceeds: raise it, or lower limits.body_bytes"
        )
    if config.adapter_root is not None and config.api_key is None and config.api_key_file is None:
        raise ConfigError("adapter_root needs an API key: only known clients may load adapters")
    if config.adapter_sources and config.combine_adapters:
        raise ConfigError(
            "combine_adapters makes one adapter of those at the start: leave adapter_sources out"
        )
    if quantization is not None and config.engine == "vllm" and quantization.bits != 4:
        raise ConfigError("--engine vllm quantises to nf4 only: use --quantize nf4, or --engine own")
    divided = config.engine == "own" and config.parallel == "tp" and (config.processes or 1) > 1
    if quantization is not None and divided:
        raise ConfigError("--parallel tp divides whole weights: leave the quantisation out, or one GPU")
    if config.replicas > 1 and config.engine == "own" and config.parallel is not None:
        raise ConfigError(
            f"replicas is {config.replicas} and parallel {config.parallel}: a copy of the model is not "
            "divided among GPUs; leave one of them out, or take --engine vllm"
        )
