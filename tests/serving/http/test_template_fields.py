"""What a request may say about the rendering of its conversation, as the model gets to see it."""

from typing import Any

import pytest

from tests.serving.http.test_chat import say

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if documents %}{% for d in documents %}<{{ d.title }}>{% endfor %}{% endif %}"
    "{% if thinking_budget is defined %}{% for _ in range(thinking_budget) %}.{% endfor %}{% endif %}"
    "{% if reasoning_effort %}(effort {{ reasoning_effort }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}/no{% endif %}{% endif %}"
)
DIALOGUE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]


async def prompt(open_site: Any, tokenizer: Any, **fields: Any) -> str:
    """Return what the model sees, or the message and field of a refusal."""
    async with open_site(template=TEMPLATE) as site:
        reply = await site.client.post("/v1/chat/completions", json={"messages": DIALOGUE[:1], **fields})
        if reply.status_code != 200:
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            return f"{error['param']}: {error['message']}"
        return str(tokenizer.decode(site.engine.requests[0].prompt_ids))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "[user]hi<|im_end|>[assistant]"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[user]hi<|im_end|>[assistant]/no"),
        ({"chat_template_kwargs": {"nobody_reads": [1, {"a": None}]}}, "[user]hi<|im_end|>[assistant]"),
        ({"chat_template_kwargs": {"thinking_budget": 3}}, "[user]hi<|im_end|>...[assistant]"),
        ({"reasoning_effort": "low"}, "[user]hi<|im_end|>(effort low)[assistant]"),
        ({"documents": [{"title": "T", "text": "x"}]}, "[user]hi<|im_end|><T>[assistant]"),
        ({"add_generation_prompt": False}, "[user]hi<|im_end|>"),
        ({"messages": DIALOGUE, "continue_final_message": True}, "[user]hi<|im_end|>[assistant]well"),
        (
            {"messages": DIALOGUE, "continue_final_message": True, "add_generation_prompt": False},
            "[user]hi<|im_end|>[assistant]well",
        ),
        (
            {"chat_template_kwargs": None, "documents": None, "continue_final_message": None},
            "[user]hi<|im_end|>[assistant]",
        ),
    ],
)
async def test_the_model_sees_what_was_asked_for(
    open_site: Any, tokenizer: Any, fields: Any, expected: str
) -> None:
    assert await prompt(open_site, tokenizer, **fields) == expected


@pytest.mark.parametrize(
    "name",
    [
        "messages", "tools", "documents", "conversation", "chat_template", "tokenize", "padding",
        "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "truncation",
        "tokenizer_kwargs", "max_length", "bos_token", "eos_token", "pad_token", "raise_exception", "range",
        "strftime_now", "namespace", "self", "__class__", "no name", "", "x" * 500,
    ],
)  # fmt: skip
async def test_a_variable_cannot_stand_for_what_the_template_gets_from_elsewhere(
    open_site: Any, tokenizer: Any, name: str
) -> None:
    value = "x" * (9000 if len(name) > 64 else 1)
    refused = await prompt(open_site, tokenizer, chat_template_kwargs={name: value})
    assert refused.startswith("chat_template_kwargs: 'chat_template_kwargs' may"), refused


@pytest.mark.parametrize("kwargs", [{"a": "x" * 9000}, {f"v{n}": n for n in range(40)}])
async def test_variables_have_a_limit(open_site: Any, tokenizer: Any, kwargs: Any) -> None:
    assert "may have 32 entries" in await prompt(open_site, tokenizer, chat_template_kwargs=kwargs)


@pytest.mark.parametrize("budget", [10**9, "many", [1], -1.5])
async def test_what_a_template_cannot_do_with_a_variable_is_a_refusal(
    open_site: Any, tokenizer: Any, budget: Any
) -> None:
    refused = await prompt(open_site, tokenizer, chat_template_kwargs={"thinking_budget": budget})
    assert refused.startswith("messages: the model's chat template refuses these messages"), refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs"),
    ],
)
async def test_the_refusal_names_the_field(open_site: Any, tokenizer: Any, fields: Any, param: str) -> None:
    assert (await prompt(open_site, tokenizer, **fields)).startswith(f"{param}: ")


async def test_documents_are_refused_where_the_template_reads_none(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.complete(documents=[{"title": "T", "text": "x"}])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "documents")


async def test_an_answer_that_continues_a_message_keeps_its_first_space(
    open_site: Any, tokenizer: Any
) -> None:
    async with open_site(template=TEMPLATE, script=say(tokenizer, " done")) as site:
        reply = await site.client.post(
            "/v1/chat/completions", json={"messages": DIALOGUE, "continue_final_message": True}
        )
    assert reply.json()["choices"][0]["message"]["content"] == " done"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_where_parallel_calls_are_not_wanted(
    open_site: Any, tokenizer: Any, stream: bool
) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>\n'
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}"
    counts = []
    async with open_site(template=template, script=say(tokenizer, call + call), context_tokens=2000) as site:
        for parallel in (True, False):
            reply = await site.complete(
                tools=tools, stream=stream, parallel_tool_calls=parallel, max_tokens=400
            )
            counts.append(reply.text.count('"name":"f"'))
    assert counts == [2, 1]


PHI_4_MINI = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}"
    "{% if m.role == 'system' and m.tools is defined %}{{ '<|tool|>' ~ m.tools ~ '<|/tool|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NINES = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}[{{ c.function.name }}{{ c.id }}]{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}{{ m.content }}{% endfor %}"
    "{{ tools | tojson if tools }}"
)
NAMED = {
    "default": "plain {{ messages[0].content }}",
    "tool_use": "tools {{ tools | tojson }}",
    "rag": "{{ documents }}",
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


async def shown(open_site: Any, tokenizer: Any, template: Any, **body: Any) -> str:
    async with open_site(template=template, context_tokens=4000) as site:
        reply = await site.client.post(
            "/tokenize", json={"messages": [{"role": "user", "content": "hi"}]} | body
        )
    assert reply.status_code == 200, reply.text
    return str(tokenizer.decode(reply.json()["tokens"]))


async def test_tools_reach_the_prompt_where_the_systems_message_has_them(
    open_site: Any, tokenizer: Any
) -> None:
    text = await shown(open_site, tokenizer, PHI_4_MINI, tools=[TOOL])
    assert text.startswith('<|system|><|tool|>[{"name": "get_weather"')
    assert text.endswith("<|user|>hi<|assistant|>")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "plain hi"),
        ({"tools": [TOOL]}, "tools [{"),
        ({"documents": [{"title": "t"}]}, "[{'title': 't'}]"),
    ],
)
async def test_named_template_is_chosen_by_what_a_request_has(
    open_site: Any, tokenizer: Any, body: dict[str, Any], text: str
) -> None:
    assert (await shown(open_site, tokenizer, NAMED, **body)).startswith(text)


async def test_prompt_of_chat_goes_through_the_default_of_named_templates(
    open_site: Any, tokenizer: Any
) -> None:
    said: list[str] = []

    def script(request: Any) -> list[int]:
        said.append(tokenizer.decode(list(request.prompt_ids)))
        return []

    async with open_site(template=NAMED, script=script) as site:
        await site.client.post("/chat", json={"prompt": "hi"})
    assert said == ["plain hi"]


async def test_ids_of_any_server_are_taken_by_a_template_of_nine_characters(
    open_site: Any, tokenizer: Any
) -> None:
    called = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": "r"},
    ]
    text = await shown(open_site, tokenizer, NINES, messages=history, tools=[TOOL])
    called_as, answered_as = text.partition("[f")[2][:9], text.partition("(")[2][:9]
    assert called_as == answered_as
    assert called_as.isalnum()


async def test_tools_that_reach_no_prompt_are_refused(open_site: Any) -> None:
    comment = TEMPLATE + "{# tools #}"
    async with open_site(template=comment) as site:
        reply = await site.complete(tools=[TOOL])
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "this model's chat template knows no tools"


@pytest.mark.parametrize(("effort", "text"), [("none", "off"), ("high", "on"), (None, "default")])
async def test_effort_turns_thinking_on_and_off(
    open_site: Any, tokenizer: Any, effort: str | None, text: str
) -> None:
    template = "{{ ('on' if enable_thinking else 'off') if enable_thinking is defined else 'default' }}"
    assert await shown(open_site, tokenizer, template, reasoning_effort=effort) == text
