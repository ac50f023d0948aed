"""Chat templates of public families, written for the tests, each with what a model has to write for a turn.

`completion(messages, index)` is stated by hand from the family's format, not computed from its template.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runtime import presets

Message = dict[str, Any]
Completion = Callable[[Sequence[Message], int], str]

SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|call|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
]


@dataclass(frozen=True)
class Family:
    """A template, what it can do, and what it makes of an answer."""

    template: str
    completion: Completion
    eos: str
    ends: tuple[str, ...] = ()
    """Further tokens that the server stops at."""
    system: bool = True
    tools: bool = False
    thoughts: bool = False

    def tokenizer(self) -> Any:
        made = _tokenizer(self.eos)
        made.chat_template = self.template
        return made

    def end_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer().convert_tokens_to_ids(list(self.ends)))


@cache
def _core() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the answer\n\n is a question\n\n\n and 42\n "] * 4, trainer)
    return str(core.to_str())


def _tokenizer(eos: str) -> Any:
    core = Tokenizer.from_str(_core())
    # The padding token is the end token: nothing may depend on telling them apart.
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=eos)


def thought_of(message: Message) -> str:
    """Return the thought that a test's message has, in its content or in a field."""
    content = message["content"]
    inside = content.split("</think>")[0].removeprefix("<think>\n") if "</think>" in content else ""
    return (message.get("reasoning_content") or inside).strip("\n")


def answer_of(message: Message) -> str:
    return str(message["content"].split("</think>")[-1]).lstrip(
        "\n" if "</think>" in message["content"] else ""
    )


def content_with(end: str, *, before: str = "", change: Callable[[str], str] = str) -> Completion:
    return lambda messages, index: before + change(messages[index]["content"]) + end


def calls_of(message: Message, name: str = "arguments") -> list[str]:
    return [
        json.dumps(
            {"name": call["function"]["name"], name: call["function"]["arguments"]}, ensure_ascii=False
        )
        for call in message.get("tool_calls", [])
    ]


# --- ChatML and its relatives ---------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{ content }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}{{ '\n' if content or not loop.first }}"
    '{{- \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{- c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen3(messages: Sequence[Message], index: int) -> str:
    message = messages[index]
    text = f"<think>\n{thought_of(message)}\n</think>\n\n{answer_of(message).lstrip(chr(10))}"
    calls = [f"<tool_call>\n{call}\n</tool_call>" for call in calls_of(message)]
    return text + ("\n" if answer_of(message) and calls else "") + "\n".join(calls) + "<|im_end|>"


def qwen3_thinking(messages: Sequence[Message], index: int) -> str:
    return qwen3(messages, index).removeprefix("<think>\n")


def nemotron(messages: Sequence[Message], index: int) -> str:
    content = messages[index]["content"]
    return (
        content.removeprefix("<think>\n") if "</think>" in content else "</think>" + content
    ) + "<|im_end|>"


def r1(messages: Sequence[Message], index: int) -> str:
    message = messages[index]
    return f"{thought_of(message)}\n</think>\n\n{answer_of(message).lstrip(chr(10))}<｜end▁of▁sentence｜>"


NEMOTRON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK_31 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)

# --- harmony ----------------------------------------------------------------------------------------

HARMONY = (
    "{%- set ns = namespace(final=-1) %}{% for m in messages %}"
    "{%- if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' and m.tool_calls %}"
    # thoughts before calls are forgotten once there is a final answer
    "{%- if m.reasoning_content and loop.index0 > ns.final %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}"
    "{% endif %}"
    "{%- set f = m.tool_calls[0].function %}"
    "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{- f.arguments | tojson + '<|call|>' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- if m.reasoning_content and loop.last and not add_generation_prompt %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}"
    "{% endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def harmony(messages: Sequence[Message], index: int) -> str:
    message = messages[index]
    thought = message.get("reasoning_content")
    before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if calls := message.get("tool_calls"):
        function = calls[0]["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        name = function["name"]
        return f"{before} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
    return f"{before}<|channel|>final<|message|>{message['content']}<|return|>"


# --- others -----------------------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% if tools %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + tools | tojson + '<|eot_id|>' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- set ns = namespace(system='', last=-1) %}{% for m in messages %}"
    "{%- if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{%- elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{%- if tools and loop.index0 == ns.last %}{{ '[INST] ' + tools | tojson + '[/INST]' }}{% endif %}"
    "{{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{{ ', ' if not loop.first }}"
    "{{- c.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)


def llama3(messages: Sequence[Message], index: int) -> str:
    message = messages[index]
    return ("".join(calls_of(message, "parameters")[:1]) or message["content"].strip()) + "<|eot_id|>"


def mistral(messages: Sequence[Message], index: int) -> str:
    message = messages[index]
    calls = ", ".join(calls_of(message))
    return f"[TOOL_CALLS] [{calls}]</s>" if calls else f" {message['content']}</s>"


PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content + '\n\n' %}{% set loop_messages = messages[1:] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (ns.system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ '\n\n' if not loop.first }}"
    "{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m.role] + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant':"
    " '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{{ m.content + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}"
    "{{ {'system': '', 'user': '### Instruction:\n', 'assistant': '### Response:\n'}[m.role] +"
    " m.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
BLOCKS_WITHOUT_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {%+ generation -%}{{ m.content }}"
    "{%- endgeneration %}{{ '<|im_end|>\n' }}{% else %}U: {{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QWEN3_THINKING = QWEN3.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
GEMMA_4 = GEMMA.replace("model\n' }}{% endif %}", "model\n<|channel>thought\n<channel|>' }}{% endif %}")
TRIMMING = CHATML.replace("m.content", "m.content | trim")
UPPER_CASE = CHATML.replace("m.content", "m.content | upper")
CLOSED_THOUGHT = CHATML.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%")


def _preset(name: str) -> str:
    return (presets.FOLDER / "chat_templates" / f"{name}.jinja").read_text()


FAMILIES = {
    "chatml": Family(CHATML, content_with("<|im_end|>"), "<|im_end|>"),
    "chatml with another eos": Family(CHATML, content_with("<|im_end|>"), "<|endoftext|>"),
    "trimming": Family(TRIMMING, content_with("<|im_end|>", change=str.strip), "<|im_end|>"),
    "upper case": Family(UPPER_CASE, content_with("<|im_end|>", change=str.upper), "<|im_end|>"),
    "qwen3": Family(QWEN3, qwen3, "<|im_end|>", tools=True, thoughts=True),
    "qwen3 thinking": Family(QWEN3_THINKING, qwen3_thinking, "<|im_end|>", tools=True, thoughts=True),
    "closed thought": Family(CLOSED_THOUGHT, content_with("<|im_end|>"), "<|im_end|>"),
    "nemotron": Family(NEMOTRON, nemotron, "<|im_end|>", thoughts=True),
    "deepseek r1": Family(R1, r1, "<｜end▁of▁sentence｜>", thoughts=True),
    "deepseek 3.1": Family(DEEPSEEK_31, content_with("<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>"),
    "harmony": Family(HARMONY, harmony, "<|return|>", ends=("<|call|>",), tools=True, thoughts=True),
    "llama 3": Family(LLAMA3, llama3, "<|eot_id|>", tools=True),
    "mistral v3": Family(MISTRAL, mistral, "</s>", tools=True),
    "phi-3": Family(PHI3, content_with("<|end|>"), "<|endoftext|>", ends=("<|end|>",)),
    "gemma": Family(GEMMA, content_with("<end_of_turn>", change=str.strip), "</s>", ends=("<end_of_turn>",)),
    "gemma 4": Family(
        GEMMA_4,
        content_with("<end_of_turn>", change=str.strip),
        "<end_of_turn>",
    ),
    "falcon": Family(FALCON, content_with("<|endoftext|>", before=" "), "<|endoftext|>"),
    "command r": Family(COMMAND_R, content_with("<|END_OF_TURN_TOKEN|>"), "<|END_OF_TURN_TOKEN|>"),
    "zephyr": Family(ZEPHYR, content_with("</s>"), "</s>"),
    "alpaca": Family(ALPACA, content_with("</s>"), "</s>"),
    "generation blocks": Family(BLOCKS, content_with("<|im_end|>"), "<|im_end|>"),
    "generation blocks without end": Family(BLOCKS_WITHOUT_END, content_with("<|im_end|>"), "<|im_end|>"),
    "phi-3 by its eos alone": Family(PHI3, content_with("<|end|>\n<|endoftext|>"), "<|endoftext|>"),
    "last messages only": Family(
        CHATML.replace("in messages", "in messages[-20:]"), content_with("<|im_end|>"), "<|im_end|>"
    ),
    "no generation prompt": Family(
        NO_PROMPT, content_with("<|im_end|>", before="<|im_start|>assistant\n"), "<|im_end|>"
    ),
    "preset falcon": Family(_preset("falcon-instruct"), content_with("</s>", before=" "), "</s>"),
    "preset llama 3": Family(
        _preset("llama-3-instruct"), content_with("<|eot_id|>", change=str.strip), "<|eot_id|>"
    ),
    "preset mistral": Family(_preset("mistral-instruct"), content_with("</s>", before=" "), "</s>"),
    "preset phi-2": Family(_preset("phi-2"), content_with("</s>", before=" "), "</s>"),
    "preset phi-3": Family(_preset("phi-3"), content_with("<|end|>"), "<|endoftext|>", ends=("<|end|>",)),
    "preset phi-4": Family(
        _preset("phi-4"), content_with("<|im_end|>"), "<|endoftext|>", ends=("<|im_end|>",)
    ),
}
