"""Constrained answers of a model of random weights: only the grammar's mask makes them valid."""

import importlib
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from runtime import hardware, models
from runtime.errors import RequestError
from runtime.metrics import ServingMetrics
from runtime.model_source import ModelSource
from runtime.serving.engine.create import create
from runtime.serving.engine.protocol import Constraint, Grammar, Request, Sampling
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http.app import create_app
from runtime.serving.http.constraint_fields import ConstraintFields, constraint
from runtime.serving.lifecycle import Lifecycle, ServedModel
from runtime.serving.settings import Limits, ServeConfig
from runtime.serving.tokenizer import PromptTokenizer

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
HI: Any = [{"role": "user", "content": "hi"}]


class Order(BaseModel):
    """What a shop's bot would fill in; nothing more, or a random model would write on and on."""

    model_config = ConfigDict(extra="forbid")

    size: Literal["small", "large"]
    count: int = Field(ge=1, le=99)
    paid: bool
    notes: list[Literal["gift", "fast", "fragile"]] = Field(max_length=2)


@pytest.fixture(scope="module")
def served(tiny_llama_dir: Path) -> Iterator[ServedModel]:
    """The tiny model of random weights behind the engine that serves it."""
    source = ModelSource(name="tiny", path=tiny_llama_dir)
    config = ServeConfig(model=source, served_name="tiny", port=0)
    devices = hardware.detect()
    model = models.load(source, hardware=devices, device=hardware.device(devices))
    tokenizer = models.load_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    running = create(config, model)
    assert tokenizer.eos_token_id is not None
    prompts = PromptTokenizer(
        tokenizer,
        context_tokens=running.context_tokens,
        new_tokens=300,
        stop_ids=frozenset({tokenizer.eos_token_id}),
        defaults=SamplingDefaults(),
    )
    yield ServedModel("tiny", running, prompts, 1)
    running.close()
    prompts.close()


@asynccontextmanager
async def opened(served: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    lifecycle = Lifecycle()
    lifecycle.ready(served)
    app = create_app(
        lifecycle=lifecycle, metrics=ServingMetrics("tiny", served.engine.stats), limits=Limits()
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


def client_of(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)


@pytest.mark.parametrize("seed", range(3))
async def test_official_client_parses_a_schema(served: ServedModel, seed: int) -> None:
    """Fault 52, json_schema: strict, through the client's own `parse`."""
    async with opened(served) as client:
        answer = await client_of(client).chat.completions.parse(
            model="tiny", messages=HI, response_format=Order, temperature=1.0, seed=seed
        )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Order)


async def test_each_choice_of_one_request_keeps_the_constraint(served: ServedModel) -> None:
    async with opened(served) as client:
        answer = await client_of(client).chat.completions.create(
            model="tiny", messages=HI, n=4, extra_body={"guided_json": Order.model_json_schema()}
        )
    texts = [choice.message.content or "" for choice in answer.choices]
    assert all(Order.model_validate_json(text) for text in texts)
    assert len(set(texts)) > 1


async def test_json_object_begins_as_one_and_is_cut_only_by_the_limit(served: ServedModel) -> None:
    async with opened(served) as client:
        answer = await client_of(client).chat.completions.create(
            model="tiny", messages=HI, response_format={"type": "json_object"}, max_tokens=40
        )
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        json.loads(choice.message.content or "")


@pytest.mark.parametrize("path", ["/chat", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_every_route_knows_choices_and_patterns(served: ServedModel, path: str) -> None:
    bodies = {"/v1/chat/completions": {"messages": HI}, "/v1/responses": {"input": "hi"}}
    body = bodies.get(path, {"prompt": "hi"})
    async with opened(served) as client:
        for extra, pattern in (
            ({"guided_choice": ["yes", "no (really)"]}, r"yes|no \(really\)"),
            ({"guided_regex": r"[a-c]{2}-\d{3}"}, r"[a-c]{2}-\d{3}"),
        ):
            reply = await client.post(path, json={**body, **extra})
            assert reply.status_code == 200, reply.text
            assert re.fullmatch(pattern, _text(reply.json())), reply.text


def _text(answer: dict[str, Any]) -> str:
    if "Result" in answer:
        return str(answer["Result"])
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice.get("text") or choice["message"]["content"])


async def test_responses_route_parses_a_schema(served: ServedModel) -> None:
    async with opened(served) as client:
        answer = await client_of(client).responses.parse(model="tiny", input="hi", text_format=Order)
    assert isinstance(answer.output_parsed, Order)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
async def test_required_call_is_made(served: ServedModel, choice: Any) -> None:
    """A model that knows nothing of tools calls the one it must, with arguments of its schema."""
    other = {
        "type": "function",
        "function": {
            "name": "stop",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    }
    tool = {"type": "function", "function": {"name": "order", "parameters": Order.model_json_schema()}}
    async with opened(served) as client:
        answer = await client_of(client).chat.completions.create(
            model="tiny",
            messages=HI,
            tools=[tool, other],
            tool_choice=choice,
            temperature=1.0,
            seed=5,  # type: ignore[list-item]
        )
    made = answer.choices[0]
    assert made.finish_reason == "tool_calls"
    (call,) = made.message.tool_calls or []
    assert call.type == "function"
    if choice != "required" or call.function.name == "order":
        Order.model_validate_json(call.function.arguments)


ONE = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
SPELLINGS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ONE}}}, "one"),
    ({"response_format": {"type": "json_object", "schema": ONE}}, "one"),
    ({"response_format": {"type": "json_schema", "schema": ONE}}, "one"),
    ({"response_format": {"type": "json", "value": ONE}}, "one"),
    ({"response_format": {"type": "regex", "pattern": "[ab]{3}"}}, "ab"),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "yes" | "no"'}}, "choice"),
    ({"structured_outputs": {"json": ONE}}, "one"),
    ({"structured_outputs": {"json": json.dumps(ONE)}}, "one"),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "ab"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice"),
    ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "choice"),
    ({"guided_json": json.dumps(ONE)}, "one"),
    ({"guided_json": ONE, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "xgrammar"}, "one"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": ONE}}}, "one"),
    ({"guided_grammar": 'start: "yes" | "no"'}, "choice"),
    ({"json_schema": ONE}, "one"),
    ({"grammar": 'root ::= "yes" | "no"'}, "choice"),
    ({"grammar": {"type": "json", "value": ONE}}, "one"),
    ({"grammar": {"type": "regex", "value": "[ab]{3}"}}, "ab"),
]


@pytest.mark.parametrize(
    ("asked", "json_"),
    [
        ({"guided_json": ONE}, True),
        ({"guided_json_object": True}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": ONE}}}, True),
        ({"structured_outputs": {"json_object": True}}, True),
        ({"guided_regex": "a"}, False),
        ({"guided_choice": ["a"]}, False),
    ],
    ids=str,
)
def test_white_space_is_that_of_every_kind_of_json_and_of_nothing_else(asked: Any, json_: bool) -> None:
    inside = {"structured_outputs": {**asked.get("structured_outputs", {}), "whitespace_pattern": " ?"}}
    spaced = inside if "structured_outputs" in asked else {**asked, "guided_whitespace_pattern": " ?"}
    body = ConstraintFields.model_validate(spaced)
    if json_:
        found = constraint(body)
        assert found is not None
        assert found.whitespace == " ?"
    else:
        with pytest.raises(RequestError, match="'guided_whitespace_pattern' is for JSON"):
            constraint(body)


def test_two_schemas_of_one_format_exclude_each_other() -> None:
    two = {"type": "json_object", "schema": ONE, "json_schema": {"schema": ONE}}
    with pytest.raises(RequestError, match=r"schema' and 'response_format\.json_schema' exclude each other"):
        constraint(ConstraintFields.model_validate({"response_format": two}))


@pytest.mark.parametrize(("extra", "form"), SPELLINGS, ids=str)
async def test_every_spelling_is_carried_out(served: ServedModel, extra: Any, form: str) -> None:
    async with opened(served) as client:
        reply = await client.post("/v1/completions", json={"prompt": "hi", "temperature": 1, **extra})
    assert reply.status_code == 200, reply.text
    assert "x-ignored-fields" not in reply.headers
    text = _text(reply.json())
    if form == "one":
        assert json.loads(text) in ({"a": 1}, {"a": 2})
    else:
        assert re.fullmatch({"ab": "[ab]{3}", "choice": "yes|no"}[form], text), text


@pytest.mark.parametrize("path", ["/chat", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_relaxed_schema_is_named_in_a_header(served: ServedModel, path: str, *, stream: bool) -> None:
    bodies = {"/v1/chat/completions": {"messages": HI}, "/v1/responses": {"input": "hi"}}
    schema = {"type": "array", "maxItems": 2, "items": {"enum": list(range(9))}, "uniqueItems": True}
    schema = ONE | {"properties": {"a": {"const": 1}, "tägs": schema}}
    body = bodies.get(path, {"prompt": "hi"}) | {"guided_json": schema, "stream": stream}
    async with opened(served) as client:
        reply = await client.post(path, json=body)
        plain = await client.post(path, json=body | {"guided_json": ONE})
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-relaxed-schema"] == "#/properties/t%C3%A4gs/uniqueItems"
    assert "x-relaxed-schema" not in plain.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_strict_schema_that_cannot_be_enforced_is_refused_with_its_path(
    served: ServedModel, path: str
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    strict = {"name": "x", "schema": schema, "strict": True}
    body: dict[str, Any] = {
        "messages": HI,
        "response_format": {"type": "json_schema", "json_schema": strict},
    }
    if path == "/v1/responses":
        body = {"input": "hi", "text": {"format": {"type": "json_schema", **strict}}}
    async with opened(served) as client:
        reply = await client.post(path, json=body)
    assert reply.status_code == 400
    assert "at #/uniqueItems" in reply.json()["error"]["message"]


async def test_forced_call_keeps_references_and_strictness(served: ServedModel) -> None:
    """`#/$defs` of a tool's parameters is theirs, wherever the call puts them."""
    parameters = {
        "$defs": {"size": {"enum": ["small", "large"]}},
        "type": "object",
        "properties": {"size": {"$ref": "#/$defs/size"}},
        "required": ["size"],
        "additionalProperties": False,
    }
    function: dict[str, Any] = {"name": "order", "parameters": parameters, "strict": True}
    body = {"messages": HI, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    async with opened(served) as client:
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        function["parameters"] = {"type": "array", "uniqueItems": True}
        refused = await client.post("/v1/chat/completions", json=body)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["size"] in {"small", "large"}
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    assert "'tool_choice' at #/uniqueItems" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_json": {"type": "strnig"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1:9/schema"}}, "guided_json"),
        ({"guided_regex": "a(b"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
    ],
)
async def test_wrong_constraint_is_400_and_names_its_field(
    served: ServedModel, extra: Any, param: str
) -> None:
    async with opened(served) as client:
        reply = await client.post("/v1/completions", json={"prompt": "hi", **extra})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


@pytest.mark.parametrize("param", ["guided_json", "json_schema"])
async def test_schema_as_text_that_is_no_json_is_not_called_the_body(served: ServedModel, param: str) -> None:
    async with opened(served) as client:
        replies = [await client.post("/chat", json={"prompt": "hi", param: text}) for text in ("{type}", " ")]
    for reply, reason in zip(replies, ("not valid JSON: key must be", "empty, expected JSON"), strict=True):
        assert reply.json()["error"]["message"].startswith(
            f"'{param}' is not a JSON schema: the text is {reason}"
        )


async def test_missing_library_is_400_and_names_the_extra(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    async with opened(served) as client:
        body = {"prompt": "hi", "response_format": {"type": "json_object"}}
        reply = await client.post("/v1/completions", json=body)
        assert reply.status_code == 400
        assert "extra 'guided'" in reply.json()["error"]["message"]
        assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_constraint_ends_the_answer_in_spite_of_min_tokens_and_ignore_eos(served: ServedModel) -> None:
    """`min_tokens` and `ignore_eos` would leave no allowed token where the grammar is complete."""
    async with opened(served) as client:
        body = {"prompt": "hi", "guided_choice": ["yes"], "min_tokens": 50, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body)
    assert reply.json()["choices"][0]["text"] == "yes"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


class Endless:
    """A mask that runs into its limits."""

    def allowed(self) -> bytes:
        raise RequestError("'guided_regex' is too complex", param="guided_regex")

    def take(self, token: int) -> None:
        raise AssertionError("nothing was allowed")


async def test_constraint_beyond_its_limits_ends_that_answer_alone(served: ServedModel) -> None:
    prompt = served.tokenizer.warm_up_prompt()
    other = served.engine.submit(Request(prompt, Sampling(max_new_tokens=30), id="other"))
    first = await anext(other)
    with pytest.raises(RequestError, match="too complex"):
        async for _ in served.engine.submit(
            Request(
                prompt,
                Sampling(max_new_tokens=5, grammar=Grammar(Constraint("regex", "endless", ""), Endless)),
                id="endless",
            )
        ):
            pass
    rest = [token async for token in other]
    assert first.id is not None
    assert rest[-1].finish_reason in {"length", "stop"}


def test_serving_imports_without_the_library() -> None:
    assert "llguidance" not in importlib.import_module("runtime.serving.structured_output").__dict__
