"""What serving and tuning share of chat templates: roles, call arguments, generation blocks, refusals."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from runtime import chat_template
from runtime.chat_template import TemplateOptions
from runtime.errors import ConfigError, TemplateRefusedError

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
PRINTED = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}[{{ c.function.argumentsHERE }}]{% endfor %}"
    "{% endfor %}"
)


def tokenizer_with(template: str | dict[str, str]) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"</s>": 0}, [])), eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("printed", "written"),
    [
        ("|tojson", '[{"city": "Łódź"}]'),
        ("", '[{"city": "Łódź"}]'),
        (" + ''", '[{"city": "Łódź"}]'),
        (".city", "[Łódź]"),
        (".items()|map('join', '=')|join", "[city=Łódź]"),
    ],
)
def test_call_arguments_are_given_as_the_template_takes_them(printed: str, written: str) -> None:
    tokenizer = tokenizer_with(PRINTED.replace("HERE", printed))
    assert chat_template.render(tokenizer, ASKED, TemplateOptions()) == written
    assert CALL["function"]["arguments"] == {"city": "Łódź"}


def test_template_that_reads_no_calls_renders_them_all_the_same() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.role }};{% endfor %}")
    assert chat_template.render(tokenizer, ASKED, TemplateOptions()) == "user;assistant;"


def test_blocks_of_generation_are_found_and_the_text_is_that_of_render() -> None:
    tokenizer = tokenizer_with(
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{%- generation +%} {{ m.content }}"
        "{{ eos_token }}{%- endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": None}]
    options = TemplateOptions(begins_answer=False)
    marked = chat_template.render_marked(tokenizer, turns, options)
    assert marked.text == chat_template.render(tokenizer, turns, options)
    assert [marked.text[start:end] for start, end in marked.generated] == [" b</s>"]


def test_template_with_a_part_for_tools_is_used_with_tools() -> None:
    tokenizer = tokenizer_with({"default": "plain", "tool_use": "{{ tools|tojson }}"})
    assert chat_template.source(tokenizer) == "plain"
    for options, text in ((TemplateOptions(), "plain"), (TemplateOptions(tools=[{"a": 1}]), '[{"a": 1}]')):
        assert chat_template.render(tokenizer, ASKED[:1], options) == text
        assert chat_template.render_marked(tokenizer, ASKED[:1], options).text == text


@pytest.mark.parametrize("render", [chat_template.render, chat_template.render_marked])
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no\n system') }}", "no system"),
        ("{{ messages[9].content + 1 }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal_in_one_line(render: Any, template: str, said: str) -> None:
    with pytest.raises(TemplateRefusedError, match=said):
        render(tokenizer_with(template), ASKED[:1], TemplateOptions())


@pytest.mark.parametrize("render", [chat_template.render, chat_template.render_marked])
def test_broken_template_is_a_configuration_error(render: Any) -> None:
    with pytest.raises(ConfigError, match="chat template is broken at line 2: Unexpected end of template"):
        render(tokenizer_with("\n{% for m in messages %}"), ASKED[:1], TemplateOptions())


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("{% generation %}{% endgeneration %}", True),
        ("{%- generation -%}{%- endgeneration %}", True),
        ("{%+ generation +%}{% endgeneration %}", True),
        ("{#- {% generation %} -#}{{ 'generation' }}", False),
        ("{% raw %}{% generation %}{% endraw %}", False),
    ],
)
def test_blocks_of_generation_are_seen_where_jinja_sees_them(template: str, marks: bool) -> None:
    assert chat_template.marks_answers(template) == marks
