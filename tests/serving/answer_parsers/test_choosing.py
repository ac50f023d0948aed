"""The format that a model answers in, by what its template writes and by its tokens."""

import copy
from typing import Any

import pytest

from runtime.chat_template import features
from runtime.serving.answer_parsers.choosing import chosen
from runtime.serving.answer_parsers.formats import CALLS, REASONING

ANSWER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}THOUGHT{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]PROMPT{% endif %}"
)
NAME, JSON = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
ENTRY = '{"name": "' + NAME + '", "arguments": ' + JSON + "}"
EACH = "{% for k, v in c.function.arguments.items() %}"
WRITTEN = {
    "hermes": f"<tool_call>\n{ENTRY}\n</tool_call>",
    "qwen3_coder": f"<tool_call>\n<function={NAME}>\n{EACH}<parameter={{{{ k }}}}>\n{{{{ v }}}}\n</parameter>"
    "{% endfor %}</function>\n</tool_call>",
    "glm45": f"<tool_call>{NAME}\n{EACH}<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{{{{ v }}}}</arg_value>"
    "{% endfor %}</tool_call>",
    "llama3_json": '{"name": "' + NAME + '", "parameters": ' + JSON + "}<|eot_id|>",
    "mistral": f"[TOOL_CALLS]{NAME}[ARGS]{JSON}</s>",
    "granite": f"<|tool_call|>[{ENTRY}]",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    f"{NAME}\n```json\n{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>{JSON}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "pythonic": f'[{NAME}({EACH}{{{{ k }}}}="{{{{ v }}}}"{{% endfor %}})]',
    "kimi_k2": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{NAME}:0"
    f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "gemma4": f"<|tool_call>call:{NAME}{{{{ '{{' }}}}{EACH}{{{{ k }}}}:"
    '<|"|>{{ v }}<|"|>{% endfor %}{{ "}" }}<tool_call|>',
    "phi4_mini_json": f"<|tool_call|>[{ENTRY}]<|/tool_call|>",
}


def form_of(tokenizer: Any, template: str, *tokens: str, **named: str) -> Any:
    used = copy.copy(tokenizer)
    used.chat_template = template
    return chosen(features(used, with_tools=True), tokens, **named)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_calls_are_read_as_the_template_writes_them(tokenizer: Any, name: str) -> None:
    assert form_of(tokenizer, ANSWER.replace("CALL", WRITTEN[name])).calls is CALLS[name]


@pytest.mark.parametrize(
    ("name", "prompt"), [("deepseek_v31", "<｜A｜>"), ("mistral", "[A]"), ("hermes", "<a>")]
)
def test_a_call_may_begin_as_the_prompt_of_an_answer_does(tokenizer: Any, name: str, prompt: str) -> None:
    template = ANSWER.replace("[{{ m.role }}]", "").replace("[assistant]PROMPT", prompt)
    assert form_of(tokenizer, template.replace("CALL", WRITTEN[name])).calls is CALLS[name]


@pytest.mark.parametrize(
    ("token", "name"),
    [("[TOOL_CALLS]", "mistral"), ("<|tool_call|>", "phi4_mini_json"), ("<|python_tag|>", "llama3_json")],
)
def test_a_template_that_writes_no_calls_leaves_it_to_the_tokens(
    tokenizer: Any, token: str, name: str
) -> None:
    assert form_of(tokenizer, ANSWER, token).calls is CALLS[name]
    assert form_of(tokenizer, ANSWER).calls is CALLS["hermes"]


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        (ANSWER.replace("PROMPT", "<think>\n"), (), "qwen3"),
        (ANSWER.replace("THOUGHT", "<think>{{ m.reasoning_content }}</think>"), (), "qwen3"),
        (ANSWER.replace("THOUGHT", "[THINK]{{ m.reasoning_content }}[/THINK]"), (), "mistral"),
        (ANSWER, ("<think>", "</think>"), "qwen3"),
        (ANSWER, ("[THINK]", "[/THINK]"), "mistral"),
        (ANSWER, ("<|channel>", "<channel|>"), "gemma4"),
    ],
)
def test_thoughts_are_looked_for_where_the_template_or_the_tokens_show_them(
    tokenizer: Any, template: str, tokens: tuple[str, ...], name: str
) -> None:
    found, expected = form_of(tokenizer, template, *tokens).thoughts, REASONING[name]
    assert expected is not None
    assert found.starts[0] == expected.starts[0]


def test_a_thought_that_only_the_prompt_shows_has_its_end_from_there(tokenizer: Any) -> None:
    found = form_of(tokenizer, ANSWER.replace("PROMPT", "<reasoning>\n")).thoughts
    assert (found.starts, found.ends) == (("<reasoning>",), ("</reasoning>",))


def test_harmony_is_told_by_tokens_or_template(tokenizer: Any) -> None:
    channel = "<|channel|>commentary to=functions." + NAME + "<|message|>" + JSON
    assert form_of(tokenizer, ANSWER, "<|channel|>", "<|message|>").harmony
    assert form_of(tokenizer, ANSWER.replace("CALL", channel)).harmony
    assert form_of(tokenizer, ANSWER, calls="openai").harmony
    assert not form_of(tokenizer, ANSWER).harmony


def test_names_overrule_the_template(tokenizer: Any) -> None:
    form = form_of(tokenizer, ANSWER, reasoning="deepseek_r1", calls="mistral")
    assert (form.thoughts, form.calls) == (REASONING["deepseek_r1"], CALLS["mistral"])


def test_a_model_without_thoughts_has_none(tokenizer: Any) -> None:
    assert form_of(tokenizer, ANSWER).thoughts is None
    assert form_of(tokenizer, "").thoughts is None
