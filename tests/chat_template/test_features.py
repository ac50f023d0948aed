"""What a template renders is found by rendering: each family's features, as its own template has them."""

import time
from typing import Any

import pytest

from runtime import chat_template
from runtime.chat_template import TemplateFeatures, rendering
from runtime.errors import ConfigError
from tests.chat_template.test_rendering import tokenizer_with
from tests.tuning.data.template_families import CHATML, FAMILIES

PHI_4_MINI = (
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL_IDS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id|length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "[{{ c.function.name }} {{ c.id }}]{% endfor %}{% elif m.role == 'tool' %}({{ m.content }})"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SWITCHED = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n"
    "</think>\n\n{% else %}<think>\n{% endif %}{% endif",
)
GRANITE = CHATML.replace(
    "{% for",
    "{% if thinking %}Think. {% endif %}{% if documents %}{{ documents[0].text }}{% endif %}{% for",
    1,
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
EFFORT = "Reasoning: {{ reasoning_effort|default('medium') }} " + CHATML.replace(
    "m.role }}", "'developer' if m.role == 'system' else m.role }}"
)
DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'developer' %}# Instructions {{ m.content }}{% else %}"
    "{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}"
)
FUNCTIONS = "{{ functions|tojson if functions else '' }}" + CHATML
LLAMA_31 = (
    "{% if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}"
    "{{ tools|tojson if tools else '' }}" + CHATML
)


def features(template: Any, **options: bool) -> TemplateFeatures:
    return chat_template.features(tokenizer_with(template), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_family(name: str) -> None:
    family = FAMILIES[name]
    found = chat_template.features(family.tokenizer())
    assert found.system == family.system
    assert (found.tools == "tools") == family.tools
    assert found.calls == family.tools
    assert found.call_ids == "any"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, {"tools": "", "thinking": "", "developer": False, "calls": False, "alternates": False}),
        (PHI_4_MINI, {"tools": "system", "documents": False}),
        (MISTRAL_IDS, {"call_ids": "nine", "calls": True, "parallel_results": True}),
        (SWITCHED, {"thinking": "enable_thinking", "thinks": True, "opens_thought": "<think>"}),
        (GRANITE, {"thinking": "thinking", "thinks": False, "documents": True, "opens_thought_on": ""}),
        (NO_SYSTEM, {"system": False, "later_system": True}),
        (EFFORT, {"effort": True, "thinking": ""}),
        (DEVELOPER, {"developer": True}),
        (LLAMA_31, {"tools": "tools", "tool_variable": "tools"}),
        (FUNCTIONS, {"tools": "tools", "tool_variable": "functions"}),
        ("{# enable_thinking 'developer' tools documents reasoning_effort #}" + CHATML,
         {"tools": "", "thinking": "", "developer": False, "documents": False, "effort": False}),
        (FAMILIES["gemma"].template, {"alternates": True}),
        (FAMILIES["nemotron"].template, {"opens_thought": "<think>", "opens_thought_on": "<think>"}),
        (FAMILIES["closed thought"].template, {"opens_thought": ""}),
        (FAMILIES["qwen3"].template,
         {"keeps_thoughts": False, "keeps_thoughts_of_calls": True, "parallel_calls": True}),
        (FAMILIES["harmony"].template, {"parallel_calls": False, "keeps_thoughts": False}),
        (FAMILIES["generation blocks"].template, {"marks_answers": True}),
    ],
)  # fmt: skip
def test_what_a_template_renders_is_found_by_rendering(template: str, expected: dict[str, Any]) -> None:
    found = features(template)
    assert {name: getattr(found, name) for name in expected} == expected


def test_no_template_renders_nothing() -> None:
    assert features(None) == TemplateFeatures()


def test_role_that_a_template_does_not_know_is_what_stands_for_it() -> None:
    plain, own = features(CHATML), features(DEVELOPER)
    assert [plain.role(role) for role in ("developer", "function", "user", "critic")] == [
        "system", "tool", "user", "critic",
    ]  # fmt: skip
    assert own.role("developer") == "developer"


def test_tools_for_the_systems_message_are_the_text_of_their_functions() -> None:
    turns = chat_template.system_with_tools(
        [{"role": "user", "content": "q"}], [{"type": "function", "function": {"name": "f"}}]
    )
    assert turns[0] == {"role": "system", "content": "", "tools": '[{"name": "f"}]'}
    text = chat_template.render(tokenizer_with(PHI_4_MINI), turns, chat_template.TemplateOptions())
    assert text == '<|system|><|tool|>[{"name": "f"}]<|/tool|><|end|><|user|>q<|end|><|assistant|>'


def test_a_template_that_takes_long_to_ask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rendering is within its limits; two hundred words that may be roles make a thousand of them."""
    monkeypatch.setattr(rendering, "PROBE_S", 0.5)
    words = ",".join(f"'w{number}'" for number in range(200))
    idle = "{% for i in range(900) %}{% for j in range(400) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"the chat template is refused: .* more than 0.5 s"):
        features("{% set roles = [" + words + "] %}" + idle + CHATML)
    assert time.monotonic() - began < 10
