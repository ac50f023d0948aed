"""What is known of each model family: one record per `model_type`, transformers' name of a configuration.

The serving engine, the tuner, the memory plan and the presets read these records, so a further family of a
known kind is one record here. Needs no torch; does not know single models or their sizes (presets.py).
Start at `Family`; `find` also answers for a family without a record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Engine = Literal["decoder", "layers", "attention", "falcon"]
"""How the serving engine runs several sequences at once: with its own decoder forward, attention, MLP and
norms; with its attention and MLP under transformers' forward; with transformers' modules, whose attention
function alone is the engine's; or, as "layers", with its own attention for Falcon."""
Norm = Literal["rms", "rms of 1 + weight", "layer"]
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh"]
"""transformers' names; "gelu_new" is spelled out in several operations."""
Float16 = Literal["works", "serves", "overflows"]
"""What was published of a family in float16, whose largest number is 65,504: nothing amiss; answers are
right but gradients of training are not finite; activations are not finite."""

QKV = ("q_proj", "k_proj", "v_proj")
LLAMA = {
    **{name: f"self_attn.{name}" for name in (*QKV, "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
"""Llama's linear modules. KAITO and many users name these for every family."""
PHI = {
    **{name: f"self_attn.{name}" for name in QKV},
    "o_proj": "self_attn.dense",
    "up_proj": "mlp.fc1",
    "down_proj": "mlp.fc2",
}
PHI3 = {
    **dict.fromkeys(QKV, "self_attn.qkv_proj"),
    "o_proj": "self_attn.o_proj",
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
    "down_proj": "mlp.down_proj",
}
GLM4 = {**LLAMA, **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj")}
FALCON = {
    **dict.fromkeys(QKV, "self_attention.query_key_value"),
    "o_proj": "self_attention.dense",
    "up_proj": "mlp.dense_h_to_4h",
    "down_proj": "mlp.dense_4h_to_h",
}
GPT_NEOX = {
    **dict.fromkeys(QKV, "attention.query_key_value"),
    "o_proj": "attention.dense",
    "up_proj": "mlp.dense_h_to_4h",
    "down_proj": "mlp.dense_4h_to_h",
}
OPT = {
    **{name: f"self_attn.{name}" for name in QKV},
    "o_proj": "self_attn.out_proj",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
MPT = {
    **dict.fromkeys(QKV, "attn.Wqkv"),
    "o_proj": "attn.out_proj",
    "up_proj": "ffn.up_proj",
    "down_proj": "ffn.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The facts about one `model_type`. The defaults are what is assumed of a family without a record."""

    model_type: str
    projections: Mapping[str, str]
    """Llama's name of each linear module of a layer -> its path below the layer, in the model's order.
    Names with one path are one fused module; an MLP without "gate_proj" has two matrices."""
    layers: str = "model.layers"
    """The path of the list of layers."""
    norm: Norm | None = None
    activation: Activation | None = None
    """Of the MLP."""
    parallel: bool = False
    """Attention and MLP read the same norm, side by side; otherwise one follows the other."""
    rope: Literal["whole", "partial"] = "whole"
    """Whether the code can rotate only a part of each head."""
    multi_query: bool = False
    """The configuration chooses between one key-value head (one norm a layer), groups of heads (two norms)
    and as many as queries, in Falcon's own terms."""
    tied_by_default: bool = False
    """The embeddings are tied where the configuration does not say."""
    plain_logits: bool = False
    """Logits are the output layer's result, neither scaled nor capped: that layer can compute the loss."""
    packed: bool = False
    """Attention goes through transformers' interface, and packed rows were compared with separate ones."""
    alike: bool = True
    """Its layers are alike and have Llama's parts: what they hold follows from a few numbers."""
    full_attention_every: int | None = None
    """Where tokens see a window, they see everything in each so many-th layer, unless the configuration says
    which; None: in none."""
    windows_asked_for: bool = False
    """Only layers from `max_window_layers` on have a window, and only with `use_sliding_window`."""
    causal: bool = True
    """transformers' AutoModelForCausalLM loads it."""
    float16: Float16 = "works"
    """Whether its numbers stay within float16; a family that does not "work" needs bfloat16 or float32."""
    engine: Engine | None = None
    """How several sequences are served at once, as compared with `generate`; None: one at a time."""

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: three matrices rather than two."""
        return "gate_proj" in self.projections

    @property
    def renames(self) -> dict[str, str]:
        """Llama's names of the modules that this family fuses or names differently -> its own."""
        own = {name: path.rpartition(".")[2] for name, path in self.projections.items()}
        return {name: its for name, its in own.items() if its != name}

    @property
    def joined_qkv(self) -> bool:
        """Whether queries, keys and values come from one module."""
        return self.projections["q_proj"] == self.projections["v_proj"]

    @property
    def fused(self) -> bool:
        """Whether the tuner fuses norms and MLPs into single operations (tuning/model/fused_ops.py)."""
        return self.norm == "rms" and self.activation == "silu"

    @property
    def own_layers(self) -> bool:
        """Whether the serving engine replaces attention and MLP by its own modules.

        Attention must be: project, optional norm per head, rotate, attend, project; the MLP gated.
        """
        return self.engine in ("decoder", "layers")


_LLAMA = Family(
    model_type="llama",
    projections=LLAMA,
    norm="rms",
    activation="silu",
    plain_logits=True,
    packed=True,
    engine="decoder",
)
_GEMMA = Family(
    model_type="gemma",
    projections=LLAMA,
    norm="rms of 1 + weight",
    activation="gelu_pytorch_tanh",
    tied_by_default=True,
)
_UNTESTED = Family(model_type="", projections=LLAMA, alike=False)

_RECORDS = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral"),
    replace(_LLAMA, model_type="qwen2", windows_asked_for=True),
    replace(_LLAMA, model_type="qwen3", windows_asked_for=True),
    replace(_LLAMA, model_type="phi3", projections=PHI3, rope="partial"),
    replace(_LLAMA, model_type="olmo2", engine=None),  # norms stand after attention and MLP
    replace(_LLAMA, model_type="smollm3", engine=None, tied_by_default=True),  # some layers do not rotate
    Family(
        model_type="phi",
        projections=PHI,
        norm="layer",
        activation="gelu_new",
        parallel=True,
        rope="partial",
        plain_logits=True,
        packed=True,
        engine="attention",
    ),
    Family(
        model_type="falcon",
        projections=FALCON,
        layers="transformer.h",
        norm="layer",
        activation="gelu",
        parallel=True,
        multi_query=True,
        tied_by_default=True,
        engine="falcon",
    ),
    replace(_GEMMA, plain_logits=True, packed=True, engine="layers"),  # its embedding is scaled
    # scores and logits are capped; float16: vllm-project/vllm, config/model.py, refuses it for Gemma 2 and 3
    replace(_GEMMA, model_type="gemma2", engine="attention", float16="overflows", full_attention_every=2),
    # activations reach 8e5: unslothai/unsloth#4014, vllm-project/vllm#18733, huggingface/transformers#36822
    replace(
        _GEMMA,
        model_type="gemma3_text",
        packed=True,
        engine="attention",
        float16="overflows",
        full_attention_every=6,
    ),
    *(
        replace(_GEMMA, model_type=name, float16="overflows", alike=False)
        for name in ("gemma3", "gemma3n", "gemma3n_text")  # 3n: unslothai/unsloth, models/loader.py
    ),
    *(
        replace(
            _GEMMA, model_type=name, float16="serves", alike=False
        )  # unslothai/unsloth#4875, unsloth-zoo#600
        for name in ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
    ),
    # its MLP is experts, one tensor a layer; float16: microsoft/onnxruntime-genai#2444
    Family(model_type="gpt_oss", projections=LLAMA, norm="rms", alike=False, float16="overflows"),
    Family(model_type="glm4", projections=GLM4, norm="rms", float16="overflows"),  # vllm-project/vllm#17154
    replace(_UNTESTED, model_type="mistral3", causal=False, tied_by_default=True),
    *(
        replace(_UNTESTED, model_type=name, float16="overflows")  # deepseek-ai/DeepSeek-V2#93
        for name in ("deepseek_v2", "deepseek_v3")
    ),
    *(
        replace(_UNTESTED, model_type=name, float16="serves")  # unslothai/unsloth, models/loader.py
        for name in (
            "qwen3_moe",
            "qwen3_5",
            "qwen3_5_text",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "glm4_moe",
            "glm4_moe_lite",
        )
    ),
    Family(model_type="gpt_neox", projections=GPT_NEOX, layers="gpt_neox.layers", norm="layer"),
    Family(
        model_type="opt", projections=OPT, layers="model.decoder.layers", norm="layer", tied_by_default=True
    ),
    Family(
        model_type="mpt", projections=MPT, layers="transformer.blocks", norm="layer", tied_by_default=True
    ),
)
FAMILIES: Mapping[str, Family] = {record.model_type: record for record in _RECORDS}


def find(model_type: str) -> Family:
    """Return the record of `model_type`; without one, a family with Llama's modules and nothing tested."""
    return FAMILIES.get(model_type) or replace(_UNTESTED, model_type=model_type)


def modules_called(projection: str) -> tuple[str, ...]:
    """Return what families call the module that Llama calls `projection`, its own name left out."""
    return tuple(
        dict.fromkeys(family.renames[projection] for family in _RECORDS if projection in family.renames)
    )
