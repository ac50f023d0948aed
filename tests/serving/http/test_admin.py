"""Token ids for text, and adapters that come and go while the server answers."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.oci.access import DEFAULT
from runtime.serving import loading
from runtime.serving.engine import failures
from runtime.serving.http.admin import AdapterLoader
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import AdapterSource, ServeConfig
from tests.adapters.made import make
from tests.serving import conftest
from tests.serving.http.test_template_fields import DIALOGUE, TEMPLATE

HI = [{"role": "user", "content": "hi"}]

pytestmark = pytest.mark.anyio


async def test_text_to_ids_and_back(open_site: Any, tokenizer: Any) -> None:
    async with open_site() as site:
        ids = (await site.client.post("/tokenize", json={"prompt": "a 🦜", "return_token_strs": True})).json()
        text = (await site.client.post("/detokenize", json={"tokens": ids["tokens"]})).json()
        wrong = await site.client.post("/detokenize", json={"tokens": [10**6]})
    assert ids["tokens"] == tokenizer.encode("a 🦜")
    assert (ids["count"], ids["max_model_len"]) == (len(ids["tokens"]), 512)
    assert ids["token_strs"][0] == "a"
    assert text == {"prompt": "a 🦜"}
    assert wrong.status_code == 400


async def test_conversation_to_ids_is_what_chat_would_generate_from(open_site: Any) -> None:
    turns = [{"role": "user", "content": "hi"}]
    async with open_site() as site:
        ids = (await site.client.post("/tokenize", json={"messages": turns})).json()["tokens"]
        await site.complete(messages=turns)
        assert tuple(ids) == site.engine.requests[0].prompt_ids


TOOLS = [{"type": "function", "function": {"name": "now"}}]
DOCUMENTS = [{"title": "a longer title", "text": "x"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": [{"name": "now"}]},
        {"chat_template_kwargs": {"thinking_budget": 9}},
        {"documents": DOCUMENTS},
        {"reasoning_effort": "low"},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"add_special_tokens": True},
    ],
    ids=str,
)
async def test_all_that_a_completion_shows_to_the_model_is_counted(open_site: Any, fields: Any) -> None:
    template = TEMPLATE + "{% if tools %}{{ tools | tojson }}{% endif %}"
    body = {"messages": DIALOGUE, **fields}
    async with open_site(template=template) as site:
        plain = (await site.client.post("/tokenize", json={"messages": DIALOGUE})).json()["tokens"]
        counted = await site.client.post("/tokenize", json=body)
        await site.client.post("/v1/chat/completions", json=body)
        assert tuple(counted.json()["tokens"]) == site.engine.requests[0].prompt_ids
    changes = fields.get("tool_choice") != "none" and "add_special_tokens" not in fields
    assert (counted.json()["tokens"] != plain) is changes


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"messages": []}, "prompt"),
        ({"content": "hi"}, "content"),
        ({"text": "hi"}, "text"),
        ({"inputs": "hi"}, "inputs"),
        ({"prompt": "hi", "add_special": False}, "add_special"),
        ({"prompt": "hi", "with_pieces": True}, "with_pieces"),
        ({"prompt": "hi", "messages": DIALOGUE}, "prompt"),
        ({"prompt": "hi", "tools": TOOLS}, "tools"),
        ({"prompt": "hi", "continue_final_message": True}, "continue_final_message"),
        ({"messages": DIALOGUE, "tools": TOOLS}, "tools"),
        ({"messages": DIALOGUE, "chat_template": "x"}, "chat_template"),
        ({"messages": DIALOGUE, "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
async def test_a_count_of_something_else_is_refused(open_site: Any, body: Any, param: str) -> None:
    async with open_site() as site:
        reply = await site.client.post("/tokenize", json=body)
        empty = await site.client.post("/tokenize", json={"prompt": ""})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert empty.json()["count"] == 0


@pytest.fixture
def adapter_loader(tmp_path: Path) -> AdapterLoader:
    """A loader that looks only at the name: what an adapter is, runtime.adapters' tests say."""
    for name in ("shop", "bad", "large"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")

    def add(served: ServedModel, source: AdapterSource) -> None:
        if Path(source.reference).name == "bad":
            raise ConfigError(f"adapter {source.name}: is it half-written?")
        if Path(source.reference).name == "large":
            raise failures.no_memory_for_adapter(source.name)
        served.engine.add_adapter(source.name, Path(source.reference))

    return AdapterLoader(tmp_path / "adapters", add)


async def test_adapter_is_loaded_used_and_unloaded(open_site: Any, adapter_loader: AdapterLoader) -> None:
    async with open_site(adapter_loader=adapter_loader) as site:
        post = site.client.post
        loaded = await post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "shop"})
        assert loaded.status_code == 200
        assert (await site.chat(adapter="new")).json()["model"] == "new"
        gone = await post("/v1/unload_lora_adapter", json={"lora_name": "new"})
        assert gone.status_code == 200
        assert (await site.chat(adapter="new")).status_code == 404
        assert (await post("/v1/unload_lora_adapter", json={"lora_name": "new"})).status_code == 404


async def test_absolute_path_within_the_directory_is_taken(
    open_site: Any, adapter_loader: AdapterLoader
) -> None:
    async with open_site(adapter_loader=adapter_loader) as site:
        body = {"lora_name": "new", "lora_path": str(adapter_loader.root / "shop")}
        assert (await site.client.post("/v1/load_lora_adapter", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("x", "../outside"),
        ("x", "shop/../../outside"),
        ("x", "/etc"),
        ("x", "link"),
        ("x", "."),
        ("x", "nothing"),
        ("x", "shop\x00"),
        ("x", "a" * 4000),
        ("x", "oci:./layout"),
        ("a/b", "shop"),
        ("..", "shop"),
        ("", "shop"),
        ("x" * 300, "shop"),
    ],
)
async def test_path_outside_and_bad_names_are_400(
    open_site: Any, adapter_loader: AdapterLoader, name: str, path: str
) -> None:
    """Fault 51."""
    async with open_site(adapter_loader=adapter_loader) as site:
        reply = await site.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] in {"lora_path", "lora_name"}
        assert site.engine.stats().adapters == ()


async def test_bad_adapter_is_refused_with_its_reason(open_site: Any, adapter_loader: AdapterLoader) -> None:
    async with open_site(adapter_loader=adapter_loader) as site:
        reply = await site.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "bad"})
    assert reply.status_code == 400
    assert "half-written" in reply.json()["error"]["message"]


async def test_adapters_that_were_not_loaded_are_counted_by_reason(
    open_site: Any, adapter_loader: AdapterLoader
) -> None:
    async with open_site(adapter_loader=adapter_loader) as site:
        for path in ("bad", "bad", "large", "shop", "../outside"):
            body = {"lora_name": "x", "lora_path": path}
            await site.client.post("/v1/load_lora_adapter", json=body)
        counted = re.findall(
            r'^runtime:adapter_failures_total\{.*reason="(\w+)".*\} (.*)',
            site.metrics.text().decode(),
            re.MULTILINE,
        )
    assert sorted(counted) == [("no_room", "1.0"), ("refused", "2.0")]


async def test_adapter_that_does_not_fit_is_507_and_another_is_loaded_after_it(
    open_site: Any, adapter_loader: AdapterLoader
) -> None:
    async with open_site(adapter_loader=adapter_loader) as site:
        post = site.client.post
        reply = await post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "large"})
        assert (await post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "shop"})).is_success
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (507, "server_error", "out_of_memory")
    assert "unload another adapter first" in error["message"]


async def test_loading_is_off_unless_a_directory_is_given(open_site: Any) -> None:
    async with open_site() as site:
        reply = await site.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "shop"})
    assert reply.status_code == 403


OWN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}{% endfor %}"
REFUSED = [
    ({"chat_template.jinja": "{% for m in messages %}"}, "the chat template is broken at line 1: "),
    ({"chat_template.jinja": "{{ 1 / 0 }}"}, "the chat template cannot render one question: division"),
    (
        {"chat_template.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        "the chat template cannot render one question: .*unsafe",
    ),
    ({"chat_template.jinja": "x" * 1_100_000}, "chat_template.jinja has over 1 MiB"),
    ({"tokenizer_config.json": '{"chat_template": 5}'}, "chat_template in tokenizer_config.json is no text"),
    ({"tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read as JSON"),
    (
        {"tokenizer.json": '{"added_tokens": [{"content": "<scratch>", "id": 300}]}'},
        r"its tokenizer has 1 tokens that the base model has not, or under another number \('<scratch>'\)",
    ),
    ({"tokenizer.json": '{"model": {"vocab": {"<|endoftext|>": 7}}}'}, "has 1 tokens"),
]


@pytest.fixture(scope="module")
def tuned(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tiny_llama_dir, tmp_path_factory.mktemp("tuned") / "a")


def loader_of(folder: Path) -> AdapterLoader:
    config = ServeConfig(model=ModelSource(name="tiny"), served_name="m")
    return AdapterLoader(folder.parent, partial(loading.add_adapter, config=config, access=DEFAULT))


async def test_an_adapter_answers_with_the_chat_template_that_it_was_tuned_with(
    open_site: Any, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = shutil.copytree(tuned, tmp_path / "a")
    (folder / "chat_template.jinja").write_text(OWN)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"content": "<pad>", "id": 300}]}')
    plain = shutil.copytree(tuned, tmp_path / "plain")
    (plain / "tokenizer_config.json").write_text(json.dumps({"chat_template": conftest.TEMPLATE}))
    async with open_site(adapter_loader=loader_of(folder)) as site:
        post = site.client.post
        for name in ("a", "plain"):
            loaded = await post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
            assert loaded.status_code == 200, loaded.text
        expected = (await post("/tokenize", json={"prompt": "### user: hi"})).json()["tokens"]
        of_base = (await post("/tokenize", json={"messages": HI})).json()["tokens"]
        body = {"messages": HI, "max_tokens": 2}
        for model, tokens in (("a", expected), ("plain", of_base), ("base", of_base)):
            told = await post("/tokenize", json={"messages": HI, "model": model})
            assert told.json()["tokens"] == tokens, model
            for route in ("/v1/chat/completions", "/chat"):
                answer = (await post(route, json=body | {"model": model})).json()
                assert answer["usage"]["prompt_tokens"] == len(tokens), (model, route)
            answer = (await post("/v1/responses", json={"model": model, "input": "hi"})).json()
            assert answer["usage"]["input_tokens"] == len(tokens)
        assert (await post("/tokenize", json={"messages": HI, "model": "other"})).status_code == 404
        await post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        (folder / "chat_template.jinja").unlink()
        await post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "a"})
        assert (await post("/tokenize", json={"messages": HI, "model": "a"})).json()["tokens"] == of_base
    said = [record.getMessage() for record in caplog.records if "own chat template" in record.getMessage()]
    assert said == ["Adapter a: requests for it use its own chat template, which differs from that of base"]


async def test_tools_are_for_adapters_whose_template_shows_them(
    open_site: Any, tuned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tuned, tmp_path / "a")
    (folder / "chat_template.jinja").write_text("{{ tools | tojson if tools }}" + OWN)
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    async with open_site(adapter_loader=loader_of(folder)) as site:
        await site.client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "a"})
        body = {"messages": HI, "max_tokens": 2, "tools": tools}
        status = {
            model: (await site.client.post("/v1/chat/completions", json=body | {"model": model})).status_code
            for model in ("a", "base")
        }
    assert status == {"a": 200, "base": 400}


@pytest.mark.parametrize(("files", "reason"), REFUSED, ids=str)
async def test_a_template_or_tokenizer_that_is_wrong_is_refused_by_name(
    open_site: Any, tuned: Path, tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    folder = shutil.copytree(tuned, tmp_path / "a")
    for name, text in files.items():
        (folder / name).write_text(text)
    async with open_site(adapter_loader=loader_of(folder)) as site:
        reply = await site.client.post("/v1/load_lora_adapter", json={"lora_name": "s", "lora_path": "a"})
    assert reply.status_code == 400
    assert re.search(f"adapter s: .*{reason}", reply.json()["error"]["message"]), reply.text
