"""The settings of a tuning job: everything `job.run` needs, resolved, checked and serialisable as JSON.

Does not know KAITO's schema (runtime/workspace turns a Workspace into a job), the environment or
torch. The parent process writes a `TuningJob` to a file, and each torchrun worker reads it back.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr

from runtime import ports
from runtime.config import Strict
from runtime.model_source import ModelSource, Quantization
from runtime.quantities import ByteQuantity
from runtime.tuning.data.formats import FORMATS

CHECKPOINT_GRACE_S = 27
"""Time for a checkpoint after SIGTERM, then torchrun kills its workers: Kubernetes gives 30 s to all."""


def _known_format(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"is {name!r}, expected one of {', '.join(FORMATS)}")
    return name


class DataSource(Strict):
    """Where training rows come from and which columns hold them. One of `urls`, `image`, `folder`."""

    urls: tuple[str, ...] = ()
    """HTTP(S) addresses of data files, each optionally with `#sha256=<64 hex>`."""
    image: str | None = None
    """OCI reference of an image with data files under /data."""
    folder: Path = Path("/mnt/data")
    """Directory that holds the data files, or into which `urls` and `image` are fetched."""
    file: Path | None = None
    """One file to use instead of all files in `folder`."""
    extension: Annotated[str, AfterValidator(_known_format)] | None = None
    """File format, when file names do not show it."""
    messages_column: str | None = None
    """Column with a list of messages; null finds it by its name."""
    context_column: str | None = None
    """Column with the prompt; null finds it by its name."""
    response_column: str | None = None
    """Column with the answer; null finds it by its name."""
    shuffle: bool = True
    """Shuffle the rows once, with `shuffle_seed`, before the split."""
    shuffle_seed: int = Field(42, ge=0)
    """Seed of the shuffle and of the train/held-out split; equal on all ranks."""
    train_share: float | None = Field(None, gt=0, le=1)
    """Part of the rows to train on; 1 holds nothing out; null a few, when there are enough."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What to do with a row that cannot be read."""
    max_bytes: ByteQuantity | None = None
    """Most bytes of all data, as sent and as unpacked; null: by the free disk and the machine's memory."""
    cache: Path | None = None
    """Folder that keeps encoded rows, so that later jobs with the same data, tokenizer and encoding need not
    make them; null keeps none. By default one in the cache folder."""
    allow_private_addresses: bool = True
    """Fetch from private and loopback addresses too. Link-local (metadata) ones are always refused."""


class Encoding(Strict):
    """How a row becomes token ids and labels."""

    max_tokens: int | None = Field(None, ge=8)
    """Longest row in tokens; null takes min(model context, 2048)."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """Rows over `max_tokens`: cut the oldest turns, then the last steps, then the end of an answer, never the
    system's message or the question; or drop; or split in several rows (of a conversation that the template
    rewrites, each question with its answers and the turns before it that fit)."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are labels: assistant turns with their end-of-turn token, or every token."""
    batching: Literal["auto", "packed", "sorted"] = "auto"
    """Rows packed into one sequence, or batches of similar length; "auto" lets the hardware decide."""


class Lora(Strict):
    """The adapter's shape (peft.LoraConfig)."""

    r: int = Field(16, ge=1)
    """Rank. Serving engines commonly accept up to 16 by default."""
    alpha: int = Field(16, ge=1)
    """Scale: the update is alpha / r times B A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module name endings to adapt, a regular expression, or "all-linear"."""
    options: dict[str, Any] = {}
    """Further arguments of peft.LoraConfig."""


class Output(Strict):
    """Where results go."""

    folder: Path = Path("/mnt/results")
    """Directory of the adapter and the report; checkpoints are below it."""
    overwrite: bool = False
    """Replace a finished adapter of another job in `folder`, once this job's is complete; else it is refused.
    In a controller's pod it is true: there a changed Workspace is how a user asks for another adapter."""
    image: str | None = None
    """Reference to push to: `registry/repository:tag`, or `oci:DIRECTORY[:tag]` for a layout on disk."""
    checkpoint_image: str | None = None
    """Reference to keep checkpoints under, such as `…:TAG-checkpoint`, for nodes whose disk is not kept."""
    keep_checkpoint_image: bool = False
    """Keep the checkpoint image in its registry after success."""
    credentials: Path | None = None
    """Docker config.json (or a directory of them) with the registry's credentials."""
    sign_key: Path | None = None
    """Private key (ECDSA P-256, PEM) that signs the image as cosign does, and checkpoints in a registry; its
    passphrase is read from COSIGN_PASSWORD."""
    provenance: bool = True
    """Attach to the image a statement of where it comes from (in-toto), and a bill of materials."""
    insecure: bool = False
    """Speak plain HTTP to the registry (loopback registries may without this)."""


class TuningJob(Strict):
    """All settings of one tuning run: the same job run twice gives the same bytes."""

    name: str
    """The Workspace's name, else the data's; shown in logs, never used as a path."""
    run: str = ""
    """What this run is called in log and report, and its folder in results/ where no other is given; by
    default `name` and the time."""
    model: ModelSource
    data: DataSource = DataSource()
    encoding: Encoding = Encoding()
    method: Literal["qlora", "lora"] = "qlora"
    """QLoRA trains on a quantised base, LoRA on the base as it is."""
    quantization: Quantization | None = Quantization()
    """None exactly when `method` is "lora"."""
    lora: Lora = Lora()
    training: dict[str, Any] = {}
    """transformers.TrainingArguments, resolved: defaults of ours and of the preset under the user's."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several GPUs: each holds the whole base model, or (FSDP2) a shard of it. The adapter is the same."""
    output: Output = Output()
    fit: Literal["refuse", "adapt", "shorten"] = "refuse"
    """When the memory plan does not fit: stop; or choose pass size and gradient checkpointing whatever the
    training arguments are (the same steps in more passes, or in fewer where memory is left over); or also cut
    rows shorter."""
    tokens_per_pass: int | None = Field(None, ge=8)
    """Most tokens of one forward pass on one rank; null is batch size times max_tokens, or where no batch
    size is set as many as the memory plan allows and a GPU gains from. A longer row is a pass of its own."""
    checkpoint_minutes: float | None = Field(10.0, gt=0)
    """Minutes between checkpoints, whatever `save_strategy` is; null turns them off."""
    sources: dict[str, str] = Field({}, repr=False)
    """Where each setting came from, by its dotted name; shown in the report only."""
    metrics_port: int | None = Field(ports.CONTROLLER, ge=0, le=65535)
    """Port of /metrics and /health while the job runs; null turns them off."""
    metrics_host: str = "127.0.0.1"
    """Address that /metrics and /health listen on; in a pod and in the image 0.0.0.0, every one."""
    hub_token: SecretStr | None = Field(None, exclude=True)
    """Hugging Face token; never written to a file, so workers read it from their environment."""
