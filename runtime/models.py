"""Loads a base model and its tokenizer: the only caller of `from_pretrained` and BitsAndBytesConfig.

`locate` finds or fetches the weights, `load` and `load_tokenizer` read them. Does not know presets,
adapters or what the model is for. torch and transformers are imported when something is loaded.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runtime import logs, model_files, model_weights, oci, packaged, weights_digest
from runtime.errors import CapacityError, ConfigError, Failure, TransientError, is_out_of_memory, one_line
from runtime.files import cache_folder
from runtime.hardware import Hardware, compute_dtype
from runtime.model_source import ModelSource, Quantization
from runtime.model_weights import WEIGHTS
from runtime.weights_digest import PendingDigest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

NEEDED_FILES = ("*.json", WEIGHTS, "*.model", "*.jinja", "*.txt", "*.py")
"""Files fetched from a repository. Pickled weights (.bin, .pt) are left out: loading them runs code."""

_OF_A_FILE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
)  # fmt: skip
"""What transformers raises while it builds a model whose configuration does not hold together."""
_LEFT_BY_CALLS = (
    "is_local", "local_files_only", "max_length", "pad_to_multiple_of", "pad_token_type_id", "stride",
    "truncation_strategy",
)  # fmt: skip
"""Keys of a tokenizer_config.json that say how a tokenizer was loaded and last called, not what it is."""

FALLBACK_CONTEXT_TOKENS = 2048
"""Context of a model whose configuration does not state one."""


def architectures() -> tuple[str, ...]:
    """Return the architectures that generate text, as config.json names them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())))


def locate(source: ModelSource, *, weights: bool = True) -> Path:
    """Return a local directory with the config, tokenizer and safetensors of `source`.

    Its JSON files are checked (model_files.py). Without `weights` a directory may lack them, and they are
    not fetched from the hub.
    In this order: its own `path` or `image`, the hub's cache, the hub, the package that ships it.
    Raises ConfigError when the model is gated, unknown or incomplete, TransientError when the hub cannot
    be reached and there is no local copy.
    """
    folder = _locate(source, weights=weights)
    model_files.check(folder)
    return folder


def _locate(source: ModelSource, *, weights: bool) -> Path:
    if source.path is not None:
        return _checked(source.path, weights=weights)
    if source.image is not None:
        return _checked(_from_image(source.image, source.required_keys), weights=weights)
    if source.repository is None:
        return _checked(Path(source.name), weights=weights)
    cached = _from_hub(source, offline=True, weights=weights)
    if cached is not None:
        return cached
    converted = cache_folder(os.environ) / "models" / source.name
    if source.package and (converted / "config.json").exists():
        return converted
    if not source.local_files_only:
        fetched = _from_hub(source, offline=False, weights=weights)
        if fetched is not None:
            return fetched
    if source.package and find_spec(source.package):
        return packaged.convert(source.package, converted)
    if source.local_files_only:
        raise ConfigError(
            f"model {source.name}: {source.repository} is not in the local cache and local_files_only is set"
        )
    package = f", and the package {source.package} that ships it is not installed" if source.package else ""
    raise TransientError(f"model {source.name}: the hub cannot be reached for {source.repository}{package}")


def digest(source: ModelSource) -> PendingDigest:
    """Return what computes the digest of the weights of `source`, as the environment asks for it."""
    chosen = weights_digest.mode(os.environ.get(weights_digest.VARIABLE))
    return PendingDigest(locate(source), name=source.name, mode=chosen)


def adapter_digest(folder: Path, name: str) -> str | None:
    """Return the digest of an adapter's weights; None where the environment turns digests off."""
    chosen = weights_digest.mode(os.environ.get(weights_digest.VARIABLE))
    found = None if chosen == "off" else weights_digest.of_folder(folder)
    if found is not None:
        log.info("weights of adapter %s: sha256 %s", name, found)
    return found


def config_file(source: ModelSource) -> Path:
    """Return the config.json of `source`, fetched alone where its weights are not here yet."""
    if source.path is not None or source.image is not None or source.repository is None:
        return locate(source, weights=False) / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        offline = source.local_files_only
        name, revision = source.repository, source.revision
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
    except LocalEntryNotFoundError:
        raise TransientError(
            f"model {source.name}: no config.json in the cache, and the hub cannot be reached"
        ) from None
    except HfHubHTTPError as error:
        raise ConfigError(f"model {source.name}: {one_line(error, 400)}") from None


def load(
    source: ModelSource,
    *,
    hardware: Hardware,
    device: str,
    quantization: Quantization | None = None,
    training: bool = False,
) -> "PreTrainedModel":
    """Return the model on `device`, in evaluation mode, its weights in the compute type of `hardware`.

    With `quantization` the linear layers are quantised while they are read, so that the full-size weights
    are never in memory together. `training` keeps a half-precision model's other layers as they are.
    ConfigError where a weight is missing, damaged or of another shape; CapacityError without memory for them.
    """
    from transformers import AutoModelForCausalLM

    folder = locate(source)
    model_weights.check_files(folder)
    _read_config(folder, source)
    options = _load_options(source, hardware, device)
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization, hardware)
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        with logs.quiet_progress(), _quiet_report():
            model, info = read(str(folder), **options)
    except (*_OF_A_FILE, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise CapacityError(
                f"model {source.name} does not fit into the memory of {hardware.name} "
                f"({hardware.memory_bytes / 2**30:.0f} GiB); quantise it (nf4) or use a larger GPU"
            ) from None
        if not isinstance(error, _OF_A_FILE) and "conversion of the weights" not in str(error):
            raise
        raise ConfigError(f"model {source.name} in {folder}: {one_line(error, 400)}") from error
    model_weights.check_loaded(model, info, name=source.name, folder=folder)
    model.train(mode=False)
    if not training:
        model.requires_grad_(False)
    return cast("PreTrainedModel", model)


@contextlib.contextmanager
def _quiet_report() -> Iterator[None]:
    """Silence transformers' table of missing and further weights: `check_loaded` says it in a line."""

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    modeling = logging.getLogger("transformers.modeling_utils")
    modeling.addFilter(keeps)
    try:
        yield
    finally:
        modeling.removeFilter(keeps)


def _load_options(source: ModelSource, hardware: Hardware, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that do not depend on quantisation."""
    import torch

    options: dict[str, Any] = {
        "dtype": getattr(torch, compute_dtype(hardware, source.dtype)),
        "device_map": {"": device},
        "local_files_only": True,
        "trust_remote_code": source.trust_remote_code,
        "use_safetensors": True,
        # told, and refused by name by `check_loaded`
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if source.attention:
        options["attn_implementation"] = source.attention
    return options


def load_config(source: ModelSource) -> "PreTrainedConfig":
    """Return the configuration of `source`, without its weights."""
    return _read_config(locate(source, weights=False), source)


def _read_config(folder: Path, source: ModelSource) -> "PreTrainedConfig":
    from transformers import AutoConfig

    with _failures_of(f"{folder / model_files.CONFIG}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    return config


@contextlib.contextmanager
def _failures_of(what: str) -> Iterator[None]:
    """Turn what a library raises while it reads a file that anybody may have written into ConfigError.

    It may be anything: of what a file holds, a library's own code is the only complete description.
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{what}: {kind}{one_line(error, 400)}") from error


def load_generation(folder: Path) -> dict[str, Any]:
    """Return the settings in the generation_config.json of a model directory; {} without one."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return {}
    with _failures_of(str(folder / model_files.GENERATION)):
        settings: dict[str, Any] = GenerationConfig.from_pretrained(str(folder)).to_diff_dict()
    return settings


def end_ids(*stated: Any) -> frozenset[int]:
    """Return all end-of-answer ids in `stated`: the `eos_token_id`s of generation_config and tokenizer.

    Each is one id, a list of ids, or None.
    """
    ids: set[int] = set()
    for entry in stated:
        ids.update(entry if isinstance(entry, list | tuple) else () if entry is None else (entry,))
    return frozenset(ids)


def stated_end_ids(source: ModelSource) -> frozenset[int]:
    """Return the end-of-answer ids of a model's generation_config.json, else of its config.json."""
    folder = locate(source, weights=False)
    if (folder / "generation_config.json").is_file():
        return end_ids(load_generation(folder).get("eos_token_id"))
    return end_ids(getattr(load_config(source), "eos_token_id", None))


def context_tokens(config: "PreTrainedConfig") -> int:
    """Return the longest sequence that a model states; FALLBACK_CONTEXT_TOKENS where it states none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or FALLBACK_CONTEXT_TOKENS)


def load_tokenizer(source: ModelSource, *, files: Path | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer, with the source's chat template where it has one and with a padding token.

    `files` is a folder with a tokenizer for the same model but no configuration of it, as an adapter's is;
    a chat template there comes before the source's. The padding token is the end-of-text one where the
    model has none; nothing here or later masks labels by comparing ids with it, so the end of an answer is
    still learned.
    """
    from transformers import AutoTokenizer

    folder = files or locate(source, weights=False)
    options: dict[str, Any] = {} if files is None else {"config": load_config(source)}
    if files is not None:
        model_files.check(files)
    with _failures_of(f"tokenizer of {source.name} in {folder}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=source.trust_remote_code, **options
        )
    template = source.chat_template
    if files is not None:
        template = tokenizer.chat_template or load_tokenizer(source).chat_template
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the tokenizer's files to `folder`, without what loading and calling left in it.

    A call that cut or padded a batch leaves that in tokenizer.json, and servers that read this file without
    transformers would cut every prompt alike. Several named chat templates are written into
    tokenizer_config.json: folders of an adapter are not in every image that holds one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for key in _LEFT_BY_CALLS:
        tokenizer.init_kwargs.pop(key, None)
    with logs.quiet_progress():
        one_template = not isinstance(tokenizer.chat_template, dict)
        tokenizer.save_pretrained(str(folder), save_jinja_files=one_template)


def _bitsandbytes(quantization: Quantization, hardware: Hardware) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, compute_dtype(hardware, quantization.compute_dtype))
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **quantization.options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
        **quantization.options,
    )


def _checked(folder: Path, *, weights: bool) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"model directory {folder}: no such directory")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model directory {folder}: no config.json; expected a Hugging Face model directory"
        )
    if weights and not any(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3])
        found = f"only pickled weights ({pickles}), which can run code" if pickles else "no weights"
        raise ConfigError(f"model directory {folder}: {found}; expected *.safetensors")
    return folder


def _from_image(name: str, required_keys: tuple[str, ...]) -> Path:
    """Return the weights of an image or artifact, pulled once by digest into the cache."""
    access = oci.from_environment(os.environ).requiring(required_keys)
    reference = oci.parse(name)
    found = oci.inspect(reference, access)
    folder = cache_folder(os.environ) / "images" / found.digest.removeprefix("sha256:")[:16]
    # by what the name stands for: of an index that holds the image, the index may be what is signed
    return oci.pull(replace(reference, tag=None, digest=found.named_digest), folder, access=access)


def _from_hub(source: ModelSource, *, offline: bool, weights: bool) -> Path | None:
    """Return the snapshot's directory; None when it is not cached (offline) or the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _readable_hub_errors(source):
            snapshot = snapshot_download(
                source.repository or "",
                revision=source.revision,
                allow_patterns=[name for name in NEEDED_FILES if weights or name != WEIGHTS],
                local_files_only=offline,
                etag_timeout=10,
            )
        folder = _checked(Path(snapshot), weights=weights)
    except LocalEntryNotFoundError:
        return None
    except ConfigError:
        if offline:  # an interrupted download left part of a snapshot
            return None
        raise
    # Of an interrupted download anything may be missing.
    return folder if weights or not offline or (folder / "tokenizer_config.json").is_file() else None


@contextlib.contextmanager
def _readable_hub_errors(source: ModelSource) -> Iterator[None]:
    """Turn the hub's refusals into ConfigError."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise ConfigError(
            f"model {source.name} is gated: accept its licence on the page of {source.repository} on the "
            "Hugging Face hub, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(
            f"model {source.name}: {source.repository} has no revision {source.revision}"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model {source.name}: no repository {source.repository} on the hub, or it is private and "
            "HF_TOKEN is missing"
        ) from None
