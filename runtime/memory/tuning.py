"""How much memory one training process takes at its peak: one function for each part, with its formula.

Numbers only: does not know jobs, devices or what fits (fitting.py). The formulas count what autograd was
seen to keep in transformers' layers with peft's adapters; tests hold them to that and to whole processes.
Letters: T tokens of a pass, L layers, h hidden, q and k widths of all queries and of all keys, I MLP
width, V vocabulary, r rank, b bytes of the compute type. Start at `parts`.
"""

from dataclasses import dataclass
from typing import Literal

from runtime.adapters import LoraFields, lora_config
from runtime.families import Family
from runtime.memory.shape import BYTES, Shape

CONTEXT_BYTES = {"cuda": 590 << 20, "cpu": 480 << 20}
"""What a process takes before the first weight: CUDA's context and cuBLAS's workspace (an estimate until
`make gpu` has run), or Python with torch, transformers and datasets (measured, 490 MB)."""
FRAGMENTATION = 0.06
"""Part of what a pass allocates that lies between its blocks and cannot be used."""
HEAP_FRAGMENTATION = 0.6
"""The same on a CPU with glibc's own settings, which keep freed blocks up to 32 MiB: measured 0.43 and 0.47
in two models, and up to 1.2 before a LoRA update was one operation; the larger value is the safer one."""
CONSTANTS_4BIT = {True: 1 / 64 + 4 / (64 * 256), False: 4 / 64}
"""Bytes of quantisation constants per weight, by whether they are quantised too: a block of 64 weights has a
constant of 4 bytes, or of 1 byte and 4 more per 256 of them (arXiv:2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class TuningRun:
    """What decides the memory of a training process, beside the model."""

    tokens: int
    """T: most tokens of one forward pass, padding included."""
    row_tokens: int
    """Longest row of them."""
    dtype: Literal["float32", "float16", "bfloat16"]
    """Compute type, of everything that is neither quantised nor an adapter."""
    device: Literal["cuda", "cpu"]
    bits: Literal[4, 8] | None = 4
    """Of the quantised base weights; None leaves them in the compute type."""
    double_quant: bool = True
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    patterned: int | None = None
    """Weights of the adapter where patterns give modules ranks of their own or leave some out."""
    dropout: bool = False
    """Of the adapters' inputs."""
    optimizer: str = "adamw_torch"
    checkpointing: bool = False
    """Activations inside a layer are computed again in the backward pass."""
    packed: bool = True
    """Documents end to end without a mask; else rows padded to a rectangle under a mask."""
    labelled_share: float = 1.0
    """Part of the tokens that count in the loss; unknown before the data is read, so all of them."""
    compact: bool = False
    """On a CPU, freed blocks go back to the system at once (hardware.return_freed_memory): 15 % slower."""
    shards: int = 1
    """Processes that the base weights are divided over (FSDP); 1 keeps all of them in each."""
    processes: int = 1
    """Processes that share gradients."""

    @property
    def width(self) -> int:
        """b, bytes of one number of the compute type."""
        return BYTES[self.dtype]


Basis = Literal["counted", "stored", "measured", "estimated"]
"""How a figure is known: exact arithmetic from the model's shape and the settings; the size of files; seen
in a run; a formula or a guess that a run may not confirm."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One line of a plan."""

    name: str
    size_bytes: int
    how: str
    """The formula with its numbers, for people."""
    basis: Basis = "counted"
    reclaimable: bool = False
    """Resident, but given back by the kernel when memory is short."""


def parts(shape: Shape, run: TuningRun) -> tuple[MemoryItem, ...]:
    """Return the parts of the memory at the peak of a training step.

    The peak is where the backward pass begins: everything it needs is kept, and the logits' gradients are
    there. In a small vocabulary it comes one layer later, so the larger of the two counts.
    """
    held = (
        weights(shape, run),
        constants(shape, run),
        others(shape, run),
        lora(shape, run),
        gradients(shape, run),
        optimizer(shape, run),
    )
    working = (
        activations(shape, run), max(logits(shape, run), layer_work(shape, run), key=lambda it: it.size_bytes)
    )  # fmt: skip
    rest = (dequantized(shape, run), fragmentation(working, run), context(run))
    return (*held, *working, *rest, *((mapped(shape, run),) if run.device == "cpu" else ()))


def total(parts: tuple[MemoryItem, ...]) -> int:
    """Return the bytes of `parts`, without what the kernel reclaims when memory is short."""
    return sum(part.size_bytes for part in parts if not part.reclaimable)


def resident(parts: tuple[MemoryItem, ...]) -> int:
    """Return the resident bytes of `parts`, mapped files included."""
    return sum(part.size_bytes for part in parts)


def weights(shape: Shape, run: TuningRun) -> MemoryItem:
    """Linear weights: parameters x (bits / 8, or b when they are not quantised) / shards."""
    each = run.bits / 8 if run.bits else run.width
    count = shape.linear_parameters
    return MemoryItem(
        "base weights", int(count * each / run.shards), f"{count / 1e9:.2f}B linear x {each:g} bytes"
    )


def constants(shape: Shape, run: TuningRun) -> MemoryItem:
    """Quantisation constants: 4-bit CONSTANTS_4BIT per weight, 8-bit 4 bytes per output of a linear."""
    if run.bits is None:
        return MemoryItem("quantisation constants", 0, "not quantised")
    if run.bits == 8:
        rows = sum(linear.copies * linear.outputs for linear in shape.linears)
        return MemoryItem("quantisation constants", int(4 * rows / run.shards), "4 bytes x outputs")
    each = CONSTANTS_4BIT[run.double_quant]
    size = int(shape.linear_parameters * each / run.shards)
    return MemoryItem(
        "quantisation constants", size, f"{shape.linear_parameters / 1e9:.2f}B x {each:.4f} bytes"
    )


def others(shape: Shape, run: TuningRun) -> MemoryItem:
    """Embedding, head and norms (and experts, which nothing quantises): parameters x b / shards."""
    count = shape.other_parameters
    how = f"{count / 1e6:.0f}M x {run.width} bytes"
    return MemoryItem("embedding, head, norms", int(count * run.width / run.shards), how)


def patterned(shape: Shape, fields: LoraFields) -> int:
    """Return the trained weights where each module has its own rank by peft's patterns, or is left out."""
    modules = shape.modules
    ranks = lora_config.ranks(fields, sorted(lora_config.targeted(fields, list(modules))))
    return sum(rank * (modules[path].inputs + modules[path].outputs) for path, rank in ranks.items())


def trained(shape: Shape, run: TuningRun) -> int:
    """Return the trained weights: sum over adapted linears of all layers of r x (inputs + outputs)."""
    if run.patterned is not None:
        return run.patterned
    adapted = shape.adapted(run.targets)
    return run.rank * sum(linear.copies * (linear.inputs + linear.outputs) for linear in adapted)


def lora(shape: Shape, run: TuningRun) -> MemoryItem:
    """Adapter weights: trained x (4 + b) bytes, float32 and, within a step, in the compute type."""
    count, each = trained(shape, run), 4 + run.width
    return MemoryItem("LoRA weights", count * each, f"{count / 1e6:.1f}M x {each} bytes")


def gradients(shape: Shape, run: TuningRun) -> MemoryItem:
    """Gradients of the adapter: trained x 4 bytes, twice where DDP has buckets of its own."""
    each = 4 if run.processes == 1 else 8
    count = trained(shape, run)
    return MemoryItem("gradients", count * each, f"{count / 1e6:.1f}M x {each} bytes")


def optimizer(shape: Shape, run: TuningRun) -> MemoryItem:
    """Optimizer state: trained x (8 for Adam, 4 for one moment, 2 for Adam in 8 bits, 0 for plain SGD)."""
    each = state_bytes(run.optimizer)
    count = trained(shape, run)
    return MemoryItem(
        "optimizer state",
        int(count * each),
        f"{run.optimizer}: {count / 1e6:.1f}M x {each:g} bytes",
        "counted" if each in (0, 4, 8) else "estimated",
    )


def state_bytes(optimizer: str) -> float:
    """Return the bytes of optimizer state per trained weight."""
    moments = 1 if any(word in optimizer for word in ("lion", "adagrad", "rmsprop")) else 2
    if optimizer == "sgd":
        return 0
    if "adafactor" in optimizer or "lomo" in optimizer:
        return 0.1  # one row and one column per matrix
    if "8bit" in optimizer:
        return moments * (1 + 4 / 256)  # bitsandbytes: a constant of 4 bytes per 256 numbers
    if "4bit" in optimizer:
        return moments * (0.5 + 4 / 128)
    return 4 * moments


def layer_bytes(shape: Shape, run: TuningRun) -> int:
    """Return what autograd keeps of one layer for the backward pass of T tokens.

    norms    2·b·h, their inputs, where they are fused; 2·4h in float32 elsewhere, and b·h where
             attention and MLP share the input (phi, falcon)
    inputs   b·h for each norm's output: 2, or 1 where they share one (phi, falcon-7b)
    adapters r·b per adapted linear; their inputs are those above and below
    q, k, v  packed b·(3q + 2k); under a mask b·4q (phi, phi3 b·5q), as keys are repeated; where one
             matrix holds them all, the values keep that whole: b·(q + k) more; one key for all queries
             (falcon-7b) finds no fused kernel: b·(3q + 2k) and 4·heads·row of attention weights
    mask     b·row where rows are padded
    MLP      b·2I where it is one operation, which needs adapters without dropout in all of it; else b·4I
             gated, b·5I phi (its GELU is spelled out), b·2I falcon
    statistics  4·heads of the attention, 8 of the norms
    """
    size, width, tokens = shape.dimensions, run.width, run.tokens
    hidden, wide = size.hidden, size.intermediate * size.active_experts
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    family = shape.family
    norms = width * hidden if family.parallel else 8 * hidden
    if family.fused:
        norms = 2 * width * hidden
    shared = family.parallel and not (family.multi_query and size.kv_heads > 1)
    inputs = width * hidden * (1 if shared else 2)
    adapted = shape.adapted(run.targets)
    ranks = width * run.rank * -(-sum(linear.copies for linear in adapted) // size.layers)
    masked = 5 if family.rope == "partial" else 4
    attention = width * (3 * queries + 2 * keys if run.packed else masked * queries)
    if family.joined_qkv and run.packed:
        attention += width * (queries + keys)
    row = min(run.row_tokens, tokens)
    if family.multi_query and size.kv_heads == 1:
        attention = width * (3 * queries + 2 * keys) + 4 * size.heads * row
    mask = 0 if run.packed else width * row
    mlp = width * wide * (2 if _mlp_is_one(shape, run) else _mlp_kept(family))
    return tokens * (norms + inputs + ranks + attention + mask + mlp + 4 * size.heads + 8)


def _mlp_is_one(shape: Shape, run: TuningRun) -> bool:
    """Whether tuning/model/fused_lora.py fuses the MLP into one operation."""
    inner = {linear.name for linear in shape.linears} & {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    adapted = {linear.name for linear in shape.adapted(run.targets)}
    return shape.family.fused and not run.dropout and run.bits != 8 and inner <= adapted


def _mlp_kept(family: Family) -> int:
    """Return how many tensors of the MLP's width are kept where it is not one operation."""
    if family.gated:
        return 4
    return {"gelu_new": 5, "gelu": 2}.get(family.activation or "", 4)


_LOSS_CHUNK_BYTES = 128 << 20


def activations(shape: Shape, run: TuningRun) -> MemoryItem:
    """Kept activations: L x layer_bytes; with checkpointing L x T·h·b, only each layer's input."""
    layers, hidden = shape.dimensions.layers, shape.dimensions.hidden
    if run.checkpointing:
        size = layers * run.tokens * hidden * run.width
        how = f"{run.tokens} tokens x {layers} layers x {hidden * run.width} bytes"
        return MemoryItem("layer inputs (checkpointing)", size, how, "estimated")
    one = layer_bytes(shape, run)
    how = f"{run.tokens} tokens x {layers} layers x {one // max(run.tokens, 1)} bytes"
    return MemoryItem("activations", layers * one, how, "estimated")


def logits(shape: Shape, run: TuningRun) -> MemoryItem:
    """Logits and loss: one float32 buffer of V columns and 128 MiB at most, and two of b where b is not 4.

    Where the output layer does not compute the loss: T x labelled share x V x 12 bytes (log-softmax, its
    gradient, the loss's gradient).
    """
    count = int(run.tokens * run.labelled_share)
    vocabulary = shape.dimensions.vocabulary
    if not shape.family.plain_logits:
        how = f"{count} labels x {vocabulary} x 12 bytes"
        return MemoryItem("logits", count * vocabulary * 12, how, "estimated")
    rows = min(count, max(1, _LOSS_CHUNK_BYTES // 4 // vocabulary))
    each = 4 if run.width == 4 else 4 + 2 * run.width
    how = f"{rows} labels at a time x {vocabulary} x {each} bytes"
    return MemoryItem("logits", rows * vocabulary * each, how, "estimated")


def layer_work(shape: Shape, run: TuningRun) -> MemoryItem:
    """One layer's backward pass: T·b·(4I + 4h) of gradients, and layer_bytes when it is computed again."""
    size = shape.dimensions
    wide = size.intermediate * size.active_experts
    work = run.tokens * run.width * (4 * wide + 4 * size.hidden)
    again = layer_bytes(shape, run) if run.checkpointing else 0
    return MemoryItem("one layer's backward", work + again, f"{run.tokens} tokens", "estimated")


def dequantized(shape: Shape, run: TuningRun) -> MemoryItem:
    """Buffer of one dequantised weight: the largest linear's parameters x b, twice for its transpose."""
    if run.bits is None:
        return MemoryItem("dequantisation buffer", 0, "not quantised")
    largest = max((linear.parameters for linear in shape.linears), default=0)
    how = f"largest linear, {largest / 1e6:.1f}M x {run.width} bytes x 2"
    return MemoryItem("dequantisation buffer", 2 * largest * run.width, how, "estimated")


def fragmentation(working: tuple[MemoryItem, ...], run: TuningRun) -> MemoryItem:
    """Memory between blocks: what every pass allocates and frees x FRAGMENTATION, or HEAP_FRAGMENTATION."""
    share = HEAP_FRAGMENTATION if run.device == "cpu" and not run.compact else FRAGMENTATION
    how = f"{share:.0%} of what a pass allocates"
    return MemoryItem("fragmentation", int(total(working) * share), how, "estimated")


def mapped(shape: Shape, run: TuningRun) -> MemoryItem:
    """The weights' files on a CPU, mapped while they are read: their size, less what is used in place."""
    size = max(0, shape.stored_bytes - shape.other_parameters * run.width)
    how = "page cache, given back when needed"
    return MemoryItem("weights' files, mapped", size, how, "stored", reclaimable=True)


def context(run: TuningRun) -> MemoryItem:
    """CONTEXT_BYTES: the process and its libraries."""
    on_gpu = run.device == "cuda"
    name, how = ("CUDA context", "with cuBLAS's workspace") if on_gpu else ("process and libraries", "Python")
    return MemoryItem(name, CONTEXT_BYTES[run.device], how, "estimated" if on_gpu else "measured")
