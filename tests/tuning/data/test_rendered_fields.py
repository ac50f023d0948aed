"""A field that the model's chat template does not render is an error, or counted, never lost in silence."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.errors import DataError
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.rendered_fields import RenderedFields
from tests.tuning.data.template_families import FAMILIES
from tests.tuning.data.test_answers import SYSTEM_IN_THE_LAST_QUESTION

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
# Llama 3.1's: one call a message, and no content beside it.
ONE_CALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}"
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('single calls only') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
FIRST_CALL = ONE_CALL.replace("{{ raise_exception('single calls only') }}", "")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
FIRST_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ m.role }}: {% if loop.last and m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content | trim | upper }}\n{% endfor %}"
)
NAMED = "{% for m in messages %}{{ m.name or m.role }}: {{ m.content }}\n{% endfor %}"
DEVELOPER = CHATML.replace("{{ m.content", "{{ '# Instructions' if m.role == 'developer' }}{{ m.content", 1)

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def call(name: str = "f") -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}


CALLING = {"role": "assistant", "content": "", "tool_calls": [call()]}
RESULT = {"role": "tool", "content": "5", "name": "f", "tool_call_id": "call00000"}
THOUGHT = {**A, "reasoning_content": "because"}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_llama_dir))


def fit(tokenizer: Any, template: str, *examples: Example, bad_rows: BadRows | None = None) -> list[Example]:
    tokenizer.chat_template = template
    return RenderedFields(tokenizer, model="tiny", bad_rows=bad_rows or BadRows()).fit(examples)


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (CHATML, (Q, A), ()),
        (CHATML, ({"role": "system", "content": "s"}, Q, RESULT, A), ()),
        (TOOLS, (Q, CALLING, RESULT, A), (TOOL,)),
        (TOOLS, (Q, {**CALLING, "content": "wait", "tool_calls": [call(), call("g")]}), ()),
        (ONE_CALL, (Q, CALLING, RESULT, A), (TOOL,)),
        (SYSTEM_IN_THE_LAST_QUESTION, ({"role": "system", "content": "s"}, Q, A, Q, A), ()),
        (THINKING, (Q, THOUGHT), ()),
        (THINKING, (Q, THOUGHT, Q, A), ()),
        (NAMED, ({**Q, "name": "ada"}, A), ()),
        ({"default": CHATML, "tool_use": TOOLS}, (Q, CALLING, RESULT, A), (TOOL,)),
    ],
)
def test_rows_that_the_template_renders_are_kept_as_they_are(
    tokenizer: Any, template: Any, messages: Any, tools: Any
) -> None:
    example = Example(messages, tools=tools, origin="row 1")
    assert fit(tokenizer, template, example) == [example]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "named"),
    [
        (CHATML, (Q, CALLING, RESULT, A), (), "tool_calls, which message 2 (assistant) has"),
        (CHATML, (Q, A), (TOOL,), "tools, which the row has"),
        (FIRST_CALL, (Q, {**CALLING, "tool_calls": [call(), call("g")]}), (), "tool_calls after the first"),
        (ONE_CALL, (Q, {**CALLING, "content": "wait"}), (), "the content beside tool_calls"),
        (TWO_ROLES, (Q, CALLING, RESULT, A), (), "tool_calls"),
        (TWO_ROLES, ({"role": "system", "content": "s"}, Q, A), (), "system messages, which message 1"),
        (TWO_ROLES, (Q, A, RESULT, A), (), "messages of the role tool, which message 3 (tool)"),
        (
            FIRST_SYSTEM,
            (Q, A, {"role": "system", "content": "s"}, Q, A),
            (),
            "system messages after the first",
        ),
        (CHATML, (Q, THOUGHT), (), "reasoning_content, which message 2"),
        (CHATML, ({**Q, "name": "ada"}, A), (), "the name of messages, which message 1 (user)"),
        ({"default": CHATML, "tool_use": TOOLS}, (Q, CALLING, RESULT, A), (), "tool_calls"),
    ],
)
def test_field_that_is_not_rendered_is_an_error_naming_field_and_template(
    tokenizer: Any, template: Any, messages: Any, tools: Any, named: str
) -> None:
    with pytest.raises(DataError) as caught:
        fit(tokenizer, template, Example(messages, tools=tools, origin="data.jsonl: row 1"))
    said = str(caught.value)
    assert said.startswith(f"data.jsonl: row 1: the chat template of tiny does not render {named}")
    assert "set chat_template in ModelConfig" in said


@pytest.mark.parametrize("name", FAMILIES)
def test_families_render_what_they_are_said_to(name: str) -> None:
    family = FAMILIES[name]
    rows = {
        "text": Example(({"role": "system", "content": "s"}, Q, A, Q, A), origin="row 1"),
        "tools": Example((Q, CALLING, RESULT, A), tools=(TOOL,), origin="row 2"),
        "thoughts": Example((Q, THOUGHT), origin="row 3"),
    }
    fields = RenderedFields(family.tokenizer(), model=name, bad_rows=BadRows())
    rendered = []
    for kind, row in rows.items():
        with contextlib.suppress(DataError):
            rendered += [kind for _ in fields.fit([row])]
    assert rendered == ["text", *(kind for kind in ("tools", "thoughts") if getattr(family, kind))]


def test_skipped_are_rows_that_make_no_sense_without_the_field(tokenizer: Any) -> None:
    bad_rows = BadRows("skip")
    bad_rows.rows = 3
    rows = [Example((Q, A), origin=f"row {number}") for number in (1, 2)]
    called = Example((Q, CALLING, RESULT, A), origin="row 3")
    assert fit(tokenizer, CHATML, *rows, called, bad_rows=bad_rows) == rows
    assert bad_rows.skipped == 1
    assert "does not render tool_calls" in bad_rows.first[0]


def test_fields_that_rows_can_do_without_are_left_out_and_counted(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad_rows = BadRows("skip")
    rows = [
        Example((Q, THOUGHT, Q, THOUGHT), origin="row 1"),
        Example((Q, THOUGHT), origin="row 2"),
        Example(({**Q, "name": "ada"}, A), tools=(TOOL,), origin="row 3"),
    ]
    with caplog.at_level(logging.WARNING):
        kept = fit(tokenizer, CHATML, *rows, bad_rows=bad_rows)
    assert [(row.messages, row.tools) for row in kept] == [((Q, A, Q, A), ()), ((Q, A), ()), ((Q, A), ())]
    assert bad_rows.skipped == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template of tiny does not render reasoning_content: left out of 2 rows",
        "the chat template of tiny does not render tools: left out of 1 row",
        "the chat template of tiny does not render the name of messages: left out of 1 row",
    ]


def test_each_field_is_tried_once_for_a_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = TOOLS
    rendered = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *args, **kwargs: rendered.append(1) or render(*args, **kwargs),
    )
    rows = [Example((Q, CALLING, RESULT, A), tools=(TOOL,), origin=f"row {n}") for n in range(50)]
    fields = RenderedFields(tokenizer, model="tiny", bad_rows=BadRows())
    assert fields.fit(rows) == rows
    assert len(rendered) <= 2 * 5  # tools, user, tool_calls, tool, assistant


def test_row_that_the_template_refuses_is_left_to_its_own_rendering(tokenizer: Any) -> None:
    refused = Example((Q, Q, THOUGHT), origin="row 1")
    assert fit(tokenizer, ALTERNATING, refused) == [refused]
    with pytest.raises(DataError, match=r"row 2: .* does not render reasoning_content"):
        fit(tokenizer, ALTERNATING, refused, Example((Q, THOUGHT), origin="row 2"))


def test_developer_is_the_system_where_the_template_has_none(tokenizer: Any) -> None:
    example = Example(({"role": "developer", "content": "s"}, Q, A), origin="row 1")
    (found,) = fit(tokenizer, CHATML, example)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    assert fit(tokenizer, DEVELOPER, example) == [example]


def test_plain_text_needs_no_template(tokenizer: Any) -> None:
    example = Example((), text="once", origin="row 1")
    for template in (None, CHATML):
        assert fit(tokenizer, template, example) == [example]  # type: ignore[arg-type]


STRIPPING = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
OPENING = STRIPPING + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "content", "lost"),
    [
        (STRIPPING, "<think>\nt\n</think>\n\na", "the thought in the content of answers"),
        (OPENING, "pre <think>t</think>post", "the text before or between thoughts"),
        (FAMILIES["qwen3"].template, "pre <think>t</think>post", "the text before or between thoughts"),
        (FAMILIES["qwen3"].template, "<think>t</think>a <think>u</think>post", "thought"),
        (FAMILIES["qwen3"].template, "<think>\nt\n</think>\n\na", ""),
        (OPENING, "<think>\nt\n</think>\n\na", ""),
        (CHATML, "pre <think>t</think>post", ""),
        (STRIPPING, "no thought", ""),
    ],
)
def test_content_with_a_thought_is_rendered_whole(
    tokenizer: Any, template: str, content: str, lost: str
) -> None:
    plain, row = Example((Q, A), origin="row 1"), Example((Q, {**A, "content": content}), origin="row 2")
    bad_rows = BadRows("skip")
    kept = fit(tokenizer, template, plain, row, bad_rows=bad_rows)
    assert len(kept) == (1 if lost else 2)
    assert all(lost in reason for reason in bad_rows.reasons)
