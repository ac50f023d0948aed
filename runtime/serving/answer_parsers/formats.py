"""Which format has which name: vLLM's names of its reasoning parsers and tool call parsers.

Does not know models. Start at `REASONING` and `CALLS`.
"""

from collections.abc import Mapping
from dataclasses import replace

from runtime.serving.answer_parsers import gemma_calls, json_calls, marked_calls, pythonic, tagged_calls
from runtime.serving.answer_parsers.forms import CallFormat, CallSpelling, ThoughtFormat

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

_ENTRY = '{"name": "{name}", "arguments": {arguments}}'
_LIST = CallSpelling(_ENTRY, before="[", between=", ", after="]")
_PYTHON = CallSpelling(
    "{name}({arguments})", before="[", between=", ", after="]", argument="{key}={value}", separator=", "
)


def _between(spelling: CallSpelling, opening: str, closing: str = "", *, token: str = "") -> CallSpelling:
    """Return a spelling of all calls with delimiters around them."""
    before, after = opening + spelling.before, spelling.after + closing
    return replace(spelling, before=before, after=after, token=token)


def _coder(opening: str, closing: str) -> CallSpelling:
    """Return Qwen3-Coder's spelling with other delimiters."""
    return CallSpelling(
        f"{opening}\n<function={{name}}>\n{{arguments}}</function>\n{closing}",
        between="\n",
        argument="<parameter={key}>\n{value}\n</parameter>\n",
        plain_text=True,
    )


HERMES = CallFormat(
    json_calls.reader(("</tool_call>",)),
    CallSpelling(f"<tool_call>\n{_ENTRY}\n</tool_call>", between="\n"),
    openings=("<tool_call>",),
    inside=("</tool_call>",),
    bare="{[",
)
"""Bare calls too: some of these families' fine-tuned models leave the tags out."""
_LLAMA = CallFormat(
    json_calls.reader(separators=(";", ",")),
    CallSpelling('{"name": "{name}", "parameters": {arguments}}', between="; "),
    openings=("<|python_tag|>",),
    inline=('{"name"', '{"type"'),
    bare="{[",
)
_CODER = CallFormat(
    tagged_calls.functions("</tool_call>"),
    _coder("<tool_call>", "</tool_call>"),
    openings=("<tool_call>", tagged_calls.FUNCTION),
    inside=("</tool_call>",),
)
_GLM = CallFormat(
    tagged_calls.glm,
    CallSpelling(
        "<tool_call>{name}\n{arguments}</tool_call>",
        between="\n",
        argument="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
        plain_text=True,
    ),
    openings=("<tool_call>",),
    inside=tagged_calls.GLM,
)


def _deepseek(call: str) -> CallFormat:
    """Return DeepSeek's calls, each written as `call`."""
    spelling = CallSpelling(
        f"{marked_calls.DEEPSEEK_CALL}{call}{marked_calls.DEEPSEEK_CALL_END}",
        before=marked_calls.DEEPSEEK,
        after=marked_calls.DEEPSEEK_END,
    )
    return CallFormat(
        marked_calls.deepseek, spelling, openings=(marked_calls.DEEPSEEK,), inside=marked_calls.IN_DEEPSEEK
    )


def _json(opening: str, closing: str = "") -> CallFormat:
    """Return JSON calls between two delimiters."""
    closings = (closing,) if closing else ()
    spelling = _between(_LIST, opening, closing)
    return CallFormat(json_calls.reader(closings), spelling, openings=(opening,), inside=closings)


def _pythonic(opening: str = "", closing: str = "", *, bare: str = "") -> CallFormat:
    """Return calls as Python between two delimiters."""
    openings, closings = (opening,) if opening else (), (closing,) if closing else ()
    spelling = _between(_PYTHON, opening, closing)
    return CallFormat(pythonic.reader(closings), spelling, openings=openings, inside=closings, bare=bare)


CALLS: Mapping[str, CallFormat | None] = {
    **dict.fromkeys(("hermes", "ernie45", "granite4"), HERMES),
    **dict.fromkeys(("qwen3_coder", "qwen3_xml", "mimo"), _CODER),
    **dict.fromkeys(("llama3_json", "llama4_json"), _LLAMA),
    "pythonic": _pythonic(bare="["),
    "llama4_pythonic": _pythonic("<|python_start|>", "<|python_end|>", bare="["),
    "lfm2": _pythonic("<|tool_call_start|>", "<|tool_call_end|>"),
    "mistral": CallFormat(
        marked_calls.mistral,
        CallSpelling(
            "[TOOL_CALLS]{name}[ARGS]{arguments}",
            token=marked_calls.MISTRAL_ARGS,
            without=_between(_LIST, marked_calls.MISTRAL),
        ),
        openings=(marked_calls.MISTRAL,),
        inside=marked_calls.IN_MISTRAL,
        bare="{[",
    ),
    "phi4_mini_json": CallFormat(
        json_calls.reader(("<|/tool_call|>",)),
        replace(
            _between(_LIST, "<|tool_call|>", "<|/tool_call|>", token="<|tool_call|>"),  # noqa: S106
            without=_between(_LIST, "functools"),
        ),
        openings=("<|tool_call|>", "functools"),
        inside=("<|/tool_call|>",),
        bare="[",
    ),
    "deepseek_v3": _deepseek("function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"),
    "deepseek_v31": _deepseek("{name}<｜tool▁sep｜>{arguments}"),
    "kimi_k2": CallFormat(
        marked_calls.kimi,
        CallSpelling(
            f"{marked_calls.KIMI_CALL}functions.{{name}}:0{marked_calls.KIMI_ARGUMENTS}{{arguments}}"
            f"{marked_calls.KIMI_CALL_END}",
            before=marked_calls.KIMI,
            after=marked_calls.KIMI_END,
        ),
        openings=(marked_calls.KIMI,),
        inside=marked_calls.IN_KIMI,
    ),
    "granite": CallFormat(
        json_calls.reader(("</tool_call>",)),
        replace(
            _between(_LIST, "<|tool_call|>", token="<|tool_call|>"),  # noqa: S106
            without=_between(_LIST, "<tool_call>"),
        ),
        openings=("<|tool_call|>", "<tool_call>"),
        inside=("</tool_call>",),
        bare="[",
    ),
    "granite-20b-fc": _json("<function_call>"),
    **dict.fromkeys(("glm45", "glm47"), _GLM),
    "jamba": _json("<tool_calls>", "</tool_calls>"),
    "seed_oss": CallFormat(
        tagged_calls.functions("</seed:tool_call>"),
        _coder("<seed:tool_call>", "</seed:tool_call>"),
        openings=("<seed:tool_call>",),
        inside=("</seed:tool_call>",),
    ),
    "minimax_m2": CallFormat(
        tagged_calls.invokes("</minimax:tool_call>"),
        CallSpelling(
            '<minimax:tool_call>\n<invoke name="{name}">\n{arguments}</invoke>\n</minimax:tool_call>',
            between="\n",
            argument='<parameter name="{key}">{value}</parameter>\n',
            plain_text=True,
        ),
        openings=("<minimax:tool_call>",),
        inside=("</minimax:tool_call>",),
    ),
    "gemma4": CallFormat(
        gemma_calls.read,
        CallSpelling(
            f"{gemma_calls.OPENING}call:{{name}}{{{{arguments}}}}{gemma_calls.CLOSING}",
            argument="{key}:{value}",
            separator=",",
            plain_text=True,
            quote=gemma_calls.QUOTE,
        ),
        openings=(gemma_calls.OPENING,),
        inside=(gemma_calls.CLOSING, gemma_calls.QUOTE),
    ),
    "internlm": _json("<|action_start|><|plugin|>", "<|action_end|>"),
    HARMONY_CALLS: None,
}
"""By name; None is harmony, which is read as a whole."""
