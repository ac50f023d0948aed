"""What a template leaves undecided is an error that names what it does; odd behaviour is said once."""

import logging
from typing import Any

import pytest

from runtime.errors import DataError
from runtime.tuning.data.answers import AnswerReader, dialogue
from tests.tuning.data.template_families import CHATML, DEEPSEEK_31, FAMILIES, R1

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def reader(template: str, family: str = "chatml") -> AnswerReader:
    tokenizer: Any = FAMILIES[family].tokenizer()
    tokenizer.chat_template = template
    return AnswerReader(tokenizer, frozenset({tokenizer.eos_token_id}))


def completion(template: str, messages: list[dict[str, Any]] = TURNS) -> str:
    answer = reader(template).answer(dialogue(messages), len(messages) - 1)
    return "".join(piece.text for piece in answer.pieces if piece.labelled)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            r"writes nothing of message 2 \(assistant\)",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
            "{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            r"has {% generation %} blocks, but writes none for message 2 \(assistant\)",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}Bot:{% endif %}",
            r"leaves open what message 2 \(assistant\) consists of: .* its generation prompt '.*Bot:'",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"refuses a conversation of user, assistant: roles must alternate",
        ),
    ],
    ids=["nothing written", "no block", "another prompt", "refused"],
)
def test_what_cannot_be_decided_names_the_templates_behaviour(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        completion(template)


def test_call_that_is_not_written_is_no_answer() -> None:
    silent = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(DataError, match=r"writes nothing of message 2 \(assistant\)"):
        completion(CHATML, [TURNS[0], silent])


def test_answer_without_a_question_is_read_where_other_answers_begin() -> None:
    assert completion(CHATML, TURNS[1:]) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "written", "rest"),
    [
        ("<think>\n", "", "\n</think>\n\nb"),
        ("<think>", "", "</think>b"),
        ("[THINK]", "", "[/THINK]b"),
        ("◁think▷", "", "◁/think▷b"),
        ("<|START_THINKING|>", "", "<|END_THINKING|>b"),
        ("<reasoning>\n", "", "\n</reasoning>\n\nb"),
        ("<think>\n\n</think>\n\n", "", "b"),
        ("<think>\n", "<think></think>", "</think>b"),
        ("<think>\n", "<think>\n\n</think>\n\n", "\n</think>\n\nb"),
        ("<think>\n", "<think>\n", "\n</think>\n\nb"),
        ("", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\nb"),
    ],
)
def test_thought_that_the_prompt_opens_is_closed(prompt: str, written: str, rest: str) -> None:
    template = CHATML.replace(
        "{{ m.content }}", f"{{{{ '{written!s}' if m.role == 'assistant' }}}}{{{{ m.content }}}}"
    ).replace("assistant\n{% endif", f"assistant\n{{{{ '{prompt}' }}}}{{% endif")
    assert completion(template.replace("\n'", "\\n'")) == rest + "<|im_end|>"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("</think>\n\nb", "b"),
        ("<think>\n\n</think>\n\nb", "b"),
        ("\n\nb", "\n\nb"),
        ("b", "b"),
    ],
)
def test_line_breaks_that_end_a_thought_are_not_the_answers_behind_a_prompt_that_ended_it(
    content: str, written: str
) -> None:
    template = DEEPSEEK_31.replace("</think>' + m.content", "</think>' + m.content.split('</think>')[-1]")
    read, asked = reader(template, "deepseek 3.1"), {"role": "user", "content": "a"}
    answer = read.answer(dialogue([asked, {"role": "assistant", "content": content}]), 1)
    assert answer.prompt.endswith("<｜Assistant｜></think>")
    assert answer.text == f"{answer.prompt}{written}<｜end▁of▁sentence｜>"


def test_behaviour_of_a_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    read = reader(R1, "deepseek r1")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            read.answer(dialogue(TURNS), 1)
    assert [record.getMessage() for record in caplog.records] == [
        "the generation prompt opens a thought (<think>): a row's thought is trained with its end, "
        "an empty one where a row has none"
    ]


CALL_TOKENS = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function | tojson }}[/TOOL_RESULTS]"
    "{% endfor %}{% if not m.tool_calls or END %}<|im_end|>{% endif %}",
)
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("end", "family", "last", "closed"),
    [
        ("true", "chatml", "<|im_end|>", True),
        ("true", "chatml with another eos", "<|im_end|>", True),
        ("false", "chatml", "[/TOOL_RESULTS]", False),
        ("m.tool_calls | length > 1", "chatml", "[/TOOL_RESULTS]", False),
    ],
)
def test_calls_end_as_answers_do_or_with_the_end_of_the_text(
    end: str, family: str, last: str, closed: bool
) -> None:
    read = reader(CALL_TOKENS.replace("END", end), family)
    answer = read.answer(dialogue([TURNS[0], CALLING]), 1)
    assert answer.text.endswith("[/TOOL_RESULTS]<|im_end|>" if closed else last)
    assert answer.closed == closed
    if "length" in end:
        two = read.answer(dialogue([TURNS[0], {**CALLING, "tool_calls": [CALL, CALL]}]), 1)
        assert (two.text[-10:], two.closed) == ("<|im_end|>", True)


def test_each_end_that_no_server_knows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    either = CHATML.replace("<|im_end|>", "{{ '<|end|>' if m.content == 'x' else '<|im_end|>' }}")
    either = either.replace("m.content == 'x'", "loop.index0 == 1")
    read = reader(either, "chatml with another eos")
    with caplog.at_level(logging.INFO):
        read.answer(dialogue(TURNS), 1)
        read.answer(dialogue([*TURNS, *TURNS]), 3)
    ends = [record.getMessage().split(",")[0] for record in caplog.records]
    assert ends == ["answers end with <|end|>", "answers end with <|im_end|>"]


def test_error_says_what_the_template_leaves_out_and_not_what_the_user_said() -> None:
    headless = CHATML.replace(
        "<|im_start|>{{ m.role }}\n{{", "{% if not m.tool_calls %}<|im_start|>{{ m.role }}\n{% endif %}{{"
    ).replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls or '' }}")
    with pytest.raises(
        DataError, match=r'it writes "\[\{.*" there without its generation prompt .<\|im_start\|>assistant'
    ):
        completion(headless, [TURNS[0], CALLING])


SYSTEM_IN_THE_LAST_QUESTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def test_question_that_is_shown_otherwise_once_answered_is_as_the_server_asks_it() -> None:
    read = reader(SYSTEM_IN_THE_LAST_QUESTION)
    messages = [{"role": "system", "content": "s"}, *TURNS, *TURNS]
    first, second = (read.answer(dialogue(messages), index) for index in (2, 4))
    assert first.text == "<s>[INST] s\n\na[/INST] b<|im_end|>"
    assert first.prompt.endswith("[/INST]")
    assert second.prompt == "<s>[INST] a[/INST] b<|im_end|>[INST] s\n\na[/INST]"
    assert second.text == second.prompt + " b<|im_end|>"
