"""Which format has which name: vLLM's names of its reasoning parsers and tool call parsers.

Does not know models. Start at `REASONING` and `CALLS`.
"""

from collections.abc import Mapping

from runtime.serving.answer_parsers import json_calls, marked_calls, pythonic, tagged_calls
from runtime.serving.answer_parsers.forms import CallFormat, ThoughtFormat

HARMONY_REASONING, HARMONY_CALLS = "openai_gptoss", "openai"

_THINK = ThoughtFormat(("<think>",), ("</think>",))
_SEED = ThoughtFormat(("<seed:think>",), ("</seed:think>",))
_GRANITE = ThoughtFormat(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)

REASONING: Mapping[str, ThoughtFormat | None] = {
    "deepseek_r1": ThoughtFormat(("<think>",), ("</think>",), implied=True),
    **dict.fromkeys(
        ("qwen3", "deepseek_v3", "deepseek_v4", "glm45", "glm47", "kimi_k2", "ernie45", "holo2", "mimo",
         "nemotron_v3", "olmo3", "step3", "step3p5"),
        _THINK,
    ),
    "minimax_m2": ThoughtFormat(("<think>",), ("</think>",), implied=True),
    "granite": _GRANITE,
    "mistral": ThoughtFormat(("[THINK]",), ("[/THINK]",)),
    "seed_oss": _SEED,
    HARMONY_REASONING: None,
}  # fmt: skip
"""By name; None is harmony, which is read as a whole."""

HERMES = CallFormat(json_calls.reader(("</tool_call>",)), openings=("<tool_call>",), bare="{[")
"""Bare calls too: some of these families' fine-tuned models leave the tags out."""
_LLAMA = CallFormat(
    json_calls.reader(separators=(";", ",")),
    openings=("<|python_tag|>",),
    inline=('{"name"', '{"type"'),
    bare="{[",
)
_PYTHONIC = CallFormat(pythonic.reader(), bare="[")
_CODER = CallFormat(tagged_calls.functions("</tool_call>"), openings=("<tool_call>", tagged_calls.FUNCTION))
_GLM = CallFormat(tagged_calls.glm, openings=("<tool_call>",))
_DEEPSEEK = CallFormat(marked_calls.deepseek, openings=(marked_calls.DEEPSEEK,))

CALLS: Mapping[str, CallFormat | None] = {
    **dict.fromkeys(("hermes", "ernie45"), HERMES),
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "mimo"), _CODER),
    **dict.fromkeys(("llama3_json", "llama4_json"), _LLAMA),
    "pythonic": _PYTHONIC,
    "llama4_pythonic": CallFormat(
        pythonic.reader(("<|python_end|>",)), openings=("<|python_start|>",), bare="["
    ),
    "lfm2": CallFormat(pythonic.reader(("<|tool_call_end|>",)), openings=("<|tool_call_start|>",)),
    "mistral": CallFormat(marked_calls.mistral, openings=(marked_calls.MISTRAL,), bare="{["),
    "phi4_mini_json": CallFormat(
        json_calls.reader(("<|/tool_call|>",)), openings=("<|tool_call|>", "functools"), bare="["
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v31"), _DEEPSEEK),
    "kimi_k2": CallFormat(marked_calls.kimi, openings=(marked_calls.KIMI,)),
    "granite": CallFormat(
        json_calls.reader(("</tool_call>",)), openings=("<|tool_call|>", "<tool_call>"), bare="["
    ),
    "granite4": HERMES,
    "granite-20b-fc": CallFormat(json_calls.reader(), openings=("<function_call>",)),
    **dict.fromkeys(("glm45", "glm47"), _GLM),
    "jamba": CallFormat(json_calls.reader(("</tool_calls>",)), openings=("<tool_calls>",)),
    "seed_oss": CallFormat(tagged_calls.functions("</seed:tool_call>"), openings=("<seed:tool_call>",)),
    "minimax_m2": CallFormat(tagged_calls.invokes("</minimax:tool_call>"), openings=("<minimax:tool_call>",)),
    "internlm": CallFormat(json_calls.reader(("<|action_end|>",)), openings=("<|action_start|><|plugin|>",)),
    "xlam": CallFormat(json_calls.reader(), openings=("[TOOL_CALLS]", "<tool_call>"), bare="{["),
    HARMONY_CALLS: None,
}
"""By name; None is harmony, which is read as a whole."""
