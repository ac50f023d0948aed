"""The models known by name: facts about each, read from the TOML files in presets/, one per family.

Knows facts a user or a memory plan needs before anything is downloaded. Does not know torch, the hub or
KAITO's schema. Start at `find` and `source`; a file is `[family]`, then one `[models.NAME]` per model
that holds only what differs.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from runtime import families, oci
from runtime.config import Strict, nearest, parse, read_text, toml_document
from runtime.errors import ConfigError
from runtime.files import kind_of
from runtime.model_source import ModelSource

FOLDER = Path(__file__).resolve().parents[1] / "presets"
"""Where the files lie, in a checkout and in an installed wheel alike."""


class Dimensions(Strict):
    """The shape of a decoder-only transformer: what a memory plan needs. All counts are per model."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    """Width of the residual stream."""
    heads: int = Field(ge=1)
    """Query heads per layer."""
    kv_heads: int = Field(ge=1)
    """Key and value heads per layer; fewer than `heads` under grouped or multi-query attention."""
    head_dim: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    """Width of the MLP, of one expert where there are several."""
    vocabulary: int = Field(ge=1)
    """Rows of the embedding matrix, padding included."""
    tied_embeddings: bool = False
    """The output projection is the embedding matrix."""
    gated_mlp: bool = True
    """Three MLP matrices (gate, up, down) instead of two (up, down)."""
    experts: int = Field(1, ge=1)
    """MLPs per layer; above 1 a router picks among them."""
    active_experts: int = Field(1, ge=1)
    """MLPs that one token passes through."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens that a sliding-window layer looks back; None where every layer sees everything."""
    full_attention_layers: int | None = Field(None, ge=0)
    """Layers that see everything although there is a sliding window; None means all."""
    other_parameters: int = Field(0, ge=0)
    """Weights beside the decoder (a vision tower), stored in the same files."""

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, without biases and norms (below 0.1 % of a layer)."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.gated_mlp else 2) * self.hidden * self.intermediate
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + mlp * self.experts + router

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and of the output projection, once when they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights, without biases and norms."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.other_parameters


class Preset(Strict):
    """One model known by name."""

    name: str = Field(pattern=r"^[a-z0-9]+(?:[.-][a-z0-9]+)*$")
    family: str
    """The family's title, for the table."""
    aliases: tuple[str, ...] = ()
    """Other names that controllers and users have for it."""
    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hugging Face repository id."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the repository."""
    package: str | None = None
    """Python package that ships the weights as GGUF, for machines that cannot reach the hub."""
    architecture: str
    """transformers class that runs it; never code from the model's repository."""
    model_type: str
    """transformers' name of the configuration."""
    licence: str
    """SPDX identifier, or the licence's own name where SPDX has none."""
    gated: bool = False
    """Downloading needs an account that has accepted the licence, and HF_TOKEN."""
    redistributable: bool = True
    """The licence lets an image that holds the weights be passed on without further conditions."""
    untunable: str | None = None
    """Why `runtime tune` does not accept it."""
    instruct: bool = True
    """Trained to follow instructions; a base model only continues text."""
    context_tokens: int = Field(ge=1)
    """Longest sequence the model was made for."""
    dimensions: Dimensions | None = None
    """None where layers differ: then `configuration` says what there is."""
    configuration: dict[str, Any] | None = None
    """What of the repository's config.json decides the number of weights, for transformers to count."""
    counted_parameters: int | None = Field(None, ge=1)
    """What it counts."""
    other_parameters: int = Field(0, ge=0)
    """Beside those: weights of towers for images and sound, loaded from the same files."""
    stored_as: Literal["float32", "float16", "bfloat16", "mxfp4", "fp8", "awq"] = "bfloat16"
    """Type of the weights in the repository's files."""
    download_gib: float = Field(gt=0)
    """Size of the safetensors files, in GiB (2**30 bytes)."""
    stored_head: bool = False
    """The files hold the output projection although it is tied to the embedding."""
    chat_template: str | None = None
    """Jinja text for models whose tokenizer brings none."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak step size for LoRA: 2e-4 up to 13B, 1e-4 above (arXiv:2305.14314, appendix B.2)."""

    @property
    def parameters(self) -> int:
        """All weights, without biases and norms where they follow from `dimensions`."""
        if self.dimensions is not None:
            return self.dimensions.parameters
        return (self.counted_parameters or 0) + self.other_parameters

    @property
    def tunable(self) -> bool:
        """Whether `runtime tune` accepts it."""
        return self.untunable is None

    @property
    def quantized(self) -> str | None:
        """Method by which the files are quantised; None for whole weights."""
        return None if self.stored_as in ("float32", "float16", "bfloat16") else self.stored_as

    @model_validator(mode="after")
    def _has_a_shape(self) -> Self:
        counted = self.configuration is not None and self.counted_parameters is not None
        if counted == (self.dimensions is not None):
            raise ValueError("expected dimensions, or configuration with counted_parameters")
        return self

    def source(self) -> ModelSource:
        """Return how to load this model."""
        return ModelSource(
            name=self.name,
            repository=self.repository,
            revision=self.revision,
            package=self.package,
            chat_template=self.chat_template,
        )


@dataclass(frozen=True, slots=True)
class _Index:
    presets: tuple[Preset, ...]
    by_name: dict[str, Preset]
    gone: dict[str, str]
    """Names of KAITO's that are none here -> why, and what to use."""


def all_presets() -> tuple[Preset, ...]:
    """Return every preset, in the order of the files' names and inside them."""
    return _index().presets


def find(name: str) -> Preset:
    """Return the preset called `name` (a name, an alias or a repository id; case does not matter)."""
    found = _index().by_name.get(name.lower())
    if found is None:
        _refuse_gone(name)
        raise ConfigError(f"unknown preset {name!r}{_hint(name)}")
    return found


def is_known(name: str) -> bool:
    """Return whether `name` is that of a preset."""
    return name.lower() in _index().by_name


def source(name: str) -> ModelSource:
    """Return how to load `name`: a preset, a directory that exists, an image, else a repository id."""
    preset = _index().by_name.get(name.lower())
    if preset is not None:
        return preset.source()
    if kind_of(name) == "folder":
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name}: no config.json in this directory, expected a Hugging Face model")
        return ModelSource(name=name, path=folder.resolve())
    if oci.is_image(name, or_repository_id=True):
        oci.parse(name.removeprefix("docker://"))
        return ModelSource(name=name, image=name.removeprefix("docker://"))
    owner, slash, repository = name.partition("/")
    if slash and owner and repository and "/" not in repository and owner not in (".", "..", "~"):
        return ModelSource(name=name, repository=name)
    _refuse_gone(name)
    raise ConfigError(
        f"no model {name!r}: not a preset, a directory or an owner/name repository id{_hint(name)}"
    )


def _refuse_gone(name: str) -> None:
    """Raise ConfigError for a name that KAITO had or has and that is no preset here."""
    reason = _index().gone.get(name.lower())
    if reason is not None:
        raise ConfigError(f"preset {name!r} {reason}")


def _hint(name: str) -> str:
    """Return the presets that `name` may have meant: those it begins, else those it resembles."""
    known = [preset.name for preset in all_presets()]
    begun = [preset for preset in known if len(name) > 2 and preset.startswith(name.lower())]
    if begun:
        return f" (did you mean {' or '.join(repr(preset) for preset in begun[:4])}?)"
    return nearest(name, known) or "; `runtime presets` lists the presets"


def matching(model: ModelSource) -> Preset | None:
    """Return the preset that `model` came from, or None."""
    return _index().by_name.get(model.name.lower())


@cache
def _index() -> _Index:
    files = {file: toml_document(read_text(file), str(file)) for file in sorted(FOLDER.glob("*.toml"))}
    gone = {
        name: f"{reason}; use {instead}"
        for document in files.values()
        for table, reason in _GONE.items()
        for name, instead in document.pop(table, {}).items()
    }
    presets = tuple(preset for file, document in files.items() for preset in _read(file, document))
    if not presets:
        raise ConfigError(f"{FOLDER}: no preset files here; the installation is incomplete")
    by_name: dict[str, Preset] = {}
    for preset in presets:
        for name in (preset.name, preset.repository, *preset.aliases):
            other = by_name.setdefault(name.lower(), preset)
            if other is not preset:
                raise ConfigError(f"{FOLDER}: the name {name!r} belongs to {other.name} and to {preset.name}")
    return _Index(presets, by_name, gone)


_GONE = {
    "retired": "was retired by KAITO",
    "too-large": "has some 670 billion weights, more than this project serves",
}
"""Tables of names that are no presets, and what is said of them; their values are what to use instead."""


def _read(file: Path, document: dict[str, Any]) -> list[Preset]:
    family, models = document.pop("family", {}), document.pop("models", {})
    if document:
        known = ", ".join(("family", "models", *_GONE))
        raise ConfigError(f"{file}: unknown table '{next(iter(document))}'; known: {known}")
    return [
        parse(Preset, _completed(_merge(family, {"name": name, **facts})), f"{file}: {name}")
        for name, facts in models.items()
    ]


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `above` over `below`, tables merged key by key."""
    merged = {**below, **above}
    for key, value in below.items():
        if isinstance(value, dict) and isinstance(above.get(key), dict):
            merged[key] = _merge(value, above[key])
    return merged


def _completed(facts: dict[str, Any]) -> dict[str, Any]:
    """Return `facts` with what the family's record says, and the chat template's text for its file name."""
    gated = families.find(str(facts.get("model_type"))).gated
    alike = not facts.get("configuration")
    completed = _merge({"dimensions": {"gated_mlp": gated}}, facts) if alike else dict(facts)
    if "chat_template" in facts:
        file = FOLDER / "chat_templates" / facts["chat_template"]
        completed["chat_template"] = read_text(file)
    return completed
