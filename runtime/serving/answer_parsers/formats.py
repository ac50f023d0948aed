"""Which format has which name: vLLM's names of its reasoning parsers and tool call parsers.

Does not know models. Start at `REASONING` and `CALLS`.
"""

from collections.abc import Mapping

from runtime.serving.answer_parsers import json_calls, marked_calls, pythonic, tagged_calls
from runtime.serving.answer_parsers.forms import CallFormat, ThoughtFormat

HARMONY_REASONING, HARMONY_CALLS = "openai_gptoss", "openai"

THINK = ThoughtFormat(("<think>",), ("</think>",))
_COHERE = ThoughtFormat(("<|START_THINKING|>",), ("<|END_THINKING|>",))
_SEED = ThoughtFormat(("<seed:think>",), ("</seed:think>",))
_GRANITE = ThoughtFormat(
    ("Here is my thought process:", "Here's my thought process:", "<think>"),
    ("Here is my response:", "Here's my response:", "</think>"),
    answer=("<response>", "</response>"),
)
"""Granite 3.2's sentences, and 3.3's tags."""

REASONING: Mapping[str, ThoughtFormat | None] = {
    "deepseek_r1": ThoughtFormat(("<think>",), ("</think>",), implied=True),
    **dict.fromkeys(
        ("qwen3", "deepseek_v3", "deepseek_v4", "glm45", "glm47", "kimi_k2", "holo2", "mimo",
         "nemotron_v3", "olmo3", "step3", "step3p5"),
        THINK,
    ),
    "minimax_m2": ThoughtFormat(("<think>",), ("</think>",), implied=True),
    "granite": _GRANITE,
    "ernie45": ThoughtFormat(("<think>",), ("</think>",), answer=("<response>", "</response>")),
    **dict.fromkeys(("cohere_command3", "cohere_command4"), _COHERE),
    "gemma4": ThoughtFormat(("<|channel>thought",), ("<channel|>",)),
    "mistral": ThoughtFormat(("[THINK]",), ("[/THINK]",)),
    "seed_oss": _SEED,
    HARMONY_REASONING: None,
}  # fmt: skip
"""By name; None is harmony, which is read as a whole."""

HERMES = CallFormat(
    json_calls.reader(("</tool_call>",)), openings=("<tool_call>",), inside=("</tool_call>",), bare="{["
)
"""Bare calls too: some of these families' fine-tuned models leave the tags out."""
_LLAMA = CallFormat(
    json_calls.reader(separators=(";", ",")),
    openings=("<|python_tag|>",),
    inline=('{"name"', '{"type"'),
    bare="{[",
)
_CODER = CallFormat(
    tagged_calls.functions("</tool_call>"),
    openings=("<tool_call>", tagged_calls.FUNCTION),
    inside=("</tool_call>",),
)
_GLM = CallFormat(tagged_calls.glm, openings=("<tool_call>",), inside=tagged_calls.GLM)
_DEEPSEEK = CallFormat(
    marked_calls.deepseek, openings=(marked_calls.DEEPSEEK,), inside=marked_calls.IN_DEEPSEEK
)


def _json(opening: str, closing: str = "", *, bare: str = "") -> CallFormat:
    """Return JSON calls between two delimiters."""
    closings = (closing,) if closing else ()
    return CallFormat(json_calls.reader(closings), openings=(opening,), inside=closings, bare=bare)


def _pythonic(opening: str = "", closing: str = "", *, bare: str = "") -> CallFormat:
    """Return calls as Python between two delimiters."""
    openings, closings = (opening,) if opening else (), (closing,) if closing else ()
    return CallFormat(pythonic.reader(closings), openings=openings, inside=closings, bare=bare)


CALLS: Mapping[str, CallFormat | None] = {
    **dict.fromkeys(("hermes", "ernie45", "granite4"), HERMES),
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "mimo"), _CODER),
    **dict.fromkeys(("llama3_json", "llama4_json"), _LLAMA),
    "pythonic": _pythonic(bare="["),
    "llama4_pythonic": _pythonic("<|python_start|>", "<|python_end|>", bare="["),
    "lfm2": _pythonic("<|tool_call_start|>", "<|tool_call_end|>"),
    "mistral": CallFormat(
        marked_calls.mistral, openings=(marked_calls.MISTRAL,), inside=marked_calls.IN_MISTRAL, bare="{["
    ),
    "phi4_mini_json": CallFormat(
        json_calls.reader(("<|/tool_call|>",)),
        openings=("<|tool_call|>", "functools"),
        inside=("<|/tool_call|>",),
        bare="[",
    ),
    **dict.fromkeys(("deepseek_v3", "deepseek_v31"), _DEEPSEEK),
    "kimi_k2": CallFormat(marked_calls.kimi, openings=(marked_calls.KIMI,), inside=marked_calls.IN_KIMI),
    "granite": CallFormat(
        json_calls.reader(("</tool_call>",)),
        openings=("<|tool_call|>", "<tool_call>"),
        inside=("</tool_call>",),
        bare="[",
    ),
    "granite-20b-fc": _json("<function_call>"),
    **dict.fromkeys(("glm45", "glm47"), _GLM),
    "jamba": _json("<tool_calls>", "</tool_calls>"),
    "seed_oss": CallFormat(
        tagged_calls.functions("</seed:tool_call>"),
        openings=("<seed:tool_call>",),
        inside=("</seed:tool_call>",),
    ),
    "minimax_m2": CallFormat(
        tagged_calls.invokes("</minimax:tool_call>"),
        openings=("<minimax:tool_call>",),
        inside=("</minimax:tool_call>",),
    ),
    "internlm": _json("<|action_start|><|plugin|>", "<|action_end|>"),
    HARMONY_CALLS: None,
}
"""By name; None is harmony, which is read as a whole."""
