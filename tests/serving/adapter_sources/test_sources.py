"""Requests name adapters that a registry holds: what they get, what it costs, and what goes wrong."""

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.serving import loading
from runtime.serving.adapter_sources import sources as module
from tests.serving.adapter_sources.conftest import ACCESS, COLOURS, OpenShop, Shelf, config_of
from tests.serving.engine.backends import test_vllm

program = test_vllm.program
pytestmark = [pytest.mark.model, pytest.mark.anyio]


async def test_an_adapter_is_loaded_by_name_once_for_all_who_ask(
    open_shop: OpenShop, shelf: Shelf, alone: dict[str, str]
) -> None:
    async with open_shop() as shop:
        answers = await asyncio.gather(*(shop.answer("red:1") for _ in range(8)))
        assert set(answers) == {alone["red"]}
        assert shelf.lookups() == 1
        assert shelf.proxy.count("GET", r"/blobs/") == 2  # a layer and the configuration
        assert await shop.answer("green") == alone["green"]  # no tag is the latest
        assert await shop.answer("tiny") == alone["tiny"]
        models = (await shop.client.get("/v1/models")).json()["data"]
        assert [each["id"] for each in models] == ["tiny", "red:1", "green"]
        assert (await shop.client.get("/v1/models/red:1")).json()["parent"] == "tiny"
        assert (
            shop.metric("runtime:adapter_load_seconds_count"),
            shop.metric("runtime:adapter_hits_total"),
        ) == (
            2,
            0,
        )
        await shop.answer("red:1")
        assert shop.metric("runtime:adapter_hits_total") == 1


async def test_the_digest_of_an_adapters_weights_is_stated_while_it_is_in_memory(open_shop: OpenShop) -> None:
    async with open_shop(resident=1) as shop:
        await shop.answer("red:1")
        red = (await shop.client.get("/v1/models/red:1")).json()["weights_sha256"]
        await shop.answer("blue:1")
        listed = (await shop.client.get("/v1/models")).json()["data"]
        stated = {each["id"]: each.get("weights_sha256") for each in listed}
        assert stated["blue:1"] not in {None, red}
        assert "red:1" not in stated
        assert len(shop.served.adapter_digests) == 1  # those that have left are not kept


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/chat", "adapter", {"prompt": "hi", "max_tokens": 1}),
        ("/chat", "model", {"prompt": "hi", "max_tokens": 1}),
        ("/v1/chat/completions", "model", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
        ("/v1/completions", "model", {"prompt": "hi", "max_tokens": 1}),
        ("/v1/responses", "model", {"input": "hi", "max_output_tokens": 16}),
        ("/tokenize", "model", {"prompt": "hi"}),
    ],
)
async def test_every_route_that_names_a_model_loads_it(
    open_shop: OpenShop, path: str, field: str, body: dict[str, object]
) -> None:
    async with open_shop() as shop:
        unknown = await shop.client.post(path, json={**body, field: "red:9"})
        error = unknown.json()["error"]
        assert (unknown.status_code, error["code"], error["param"]) == (404, "model_not_found", field)
        assert "red:9" in error["message"]
        response = await shop.client.post(path, json={**body, field: "red:1"})
        assert response.status_code == 200, response.text
        assert shop.sources.loaded("red:1")


async def test_a_stream_keeps_its_adapter_until_its_end_and_unloading_takes_it(open_shop: OpenShop) -> None:
    async with open_shop(resident=1) as shop:
        body = {"model": "red:1", "prompt": "the colour is", "max_tokens": 4, "stream": True}
        async with shop.client.stream("POST", "/v1/completions", json=body) as stream:
            text = "".join([line async for line in stream.aiter_lines()])
        assert '"model":"red:1"' in text
        await shop.answer("blue:1")
        assert (shop.sources.loaded("red:1"), shop.sources.loaded("blue:1")) == (False, True)
        assert shop.metric("runtime:adapter_evictions_total", place="memory") == 1


async def test_one_in_use_never_leaves_and_the_next_waits_for_room(
    open_shop: OpenShop, alone: dict[str, str]
) -> None:
    async with open_shop(resident=2) as shop:
        held = [await shop.sources.lease(shop.served, name, param="model") for name in ("red:1", "green:1")]
        waiting = asyncio.create_task(shop.answer("blue:1"))
        await shop.until(shop.sources._memory.locked)
        assert await shop.answer("red:1") == alone["red"]  # others go on
        resident = shop.sources._residents.find(held[1])
        assert resident is not None
        shop.sources._release(shop.served, resident)
        assert await waiting == alone["blue"]
        assert [shop.sources.loaded(name) for name in ("red:1", "green:1", "blue:1")] == [True, False, True]


async def test_an_unknown_name_costs_one_look_up_a_minute(open_shop: OpenShop, shelf: Shelf) -> None:
    async with open_shop() as shop:
        for _ in range(3):
            assert (await shop.ask("red:2")).status_code == 404
        assert shelf.lookups("red:2") == 1
        shop.now[0] += module.REMEMBERED_S
        assert (await shop.ask("red:2")).status_code == 404
        assert shelf.lookups("red:2") == 2
        assert shop.metric("runtime:adapter_failures_total", reason="unknown") == 2


@pytest.mark.parametrize(
    "name",
    [
        "evil.example/x:1", "../x:1", "red:..", "red@sha256:" + "0" * 64, "red:1@sha256:" + "0" * 64, "Red:1",
        "red:", "//red:1", "/red:1", "red/:1", "http://evil.example/x:1", "evil.example:5000/x:1", "red:1:2",
        "red 1", "red:1\n", "a" * 256, "red%2f:1", "x\u0000:1", ":", "red?x:1", "red#x:1", "r\u0435d:1",
        ".red:1",
    ],
)  # fmt: skip
async def test_no_name_leads_out_of_the_source(open_shop: OpenShop, shelf: Shelf, name: str) -> None:
    async with open_shop() as shop:
        response = await shop.ask(name)
        if response.status_code == 404:
            assert all("/team/adapters/" in seen.path or seen.path == "/v2/" for seen in shelf.proxy.seen)
            if name != "evil.example/x:1":  # a name like another
                assert shelf.proxy.seen == []
        else:
            assert response.status_code == 400
            assert shelf.proxy.seen == []


async def test_a_source_that_is_a_repository_takes_tags_alone(
    open_shop: OpenShop, shelf: Shelf, alone: dict[str, str]
) -> None:
    sources = (f"{shelf.source}/nothing", f"{shelf.source}/red", shelf.source)
    async with open_shop(sources=sources) as shop:
        assert await shop.answer(":1") == alone["red"]
        assert await shop.answer("blue:1") == alone["blue"]


async def test_a_tag_that_moves_is_followed_and_requests_in_flight_keep_the_old_weights(
    open_shop: OpenShop, shelf: Shelf, colours: dict[str, Path], alone: dict[str, str]
) -> None:
    shelf.push(colours["red"], "moving:1")
    async with open_shop(refresh_s=30) as shop:
        old = await shop.sources.lease(shop.served, "moving:1", param="model")
        shelf.push(colours["blue"], "moving:1")
        assert await shop.answer("moving:1") == alone["red"]  # looked up just now
        shop.now[0] += 30
        assert await shop.answer("moving:1") == alone["red"]  # asked for beside the request
        await shop.until(lambda: not shop.sources._refreshes)
        assert await shop.answer("moving:1") == alone["blue"]
        assert shelf.lookups("moving:1") == 3  # at first, again, and to load it
        assert old in shop.served.engine.stats().adapters
        resident = shop.sources._residents.find(old)
        assert resident is not None
        shop.sources._release(shop.served, resident)
        await shop.until(lambda: old not in shop.served.engine.stats().adapters)
        assert shop.served.models() == ("tiny", "moving:1")


async def test_where_the_registry_is_down_those_in_memory_go_on_and_others_may_be_tried_again(
    open_shop: OpenShop, shelf: Shelf, alone: dict[str, str]
) -> None:
    async with open_shop(refresh_s=30) as shop:
        await shop.answer("red:1")
        shelf.proxy.fault("HEAD|GET", "/manifests/", "status", status=503, times=1000)
        shop.now[0] += 30
        assert await shop.answer("red:1") == alone["red"]
        await shop.until(lambda: not shop.sources._refreshes)
        assert await shop.answer("red:1") == alone["red"]
        response = await shop.ask("green:1")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert shelf.proxy.host not in response.text
        shelf.proxy.faults.clear()
        shop.now[0] += module.OUTAGE_S
        assert await shop.answer("green:1") == alone["green"]


async def test_a_client_that_leaves_ends_no_pull_that_others_wait_for(
    open_shop: OpenShop, shelf: Shelf, alone: dict[str, str]
) -> None:
    shelf.proxy.fault("GET", "/blobs/", "hang", headers={"seconds": "0.5"})
    async with open_shop() as shop:
        first = asyncio.create_task(shop.answer("grey:1"))
        await shop.until(lambda: bool(shop.sources._loads))
        second = asyncio.create_task(shop.answer("grey:1"))
        await shop.until(lambda: shop.sources._waiting == 2)
        first.cancel()
        assert await second == alone["grey"]
        assert shelf.lookups("grey:1") == 1
        await shop.until(lambda: all(each.leases == 0 for each in shop.sources._residents))


async def test_too_many_and_too_long_waits_are_refused_and_may_be_tried_again(
    open_shop: OpenShop, shelf: Shelf, alone: dict[str, str]
) -> None:
    shelf.proxy.fault("GET", "/blobs/", "hang", headers={"seconds": "1"})
    async with open_shop(waiting=1, wait_s=0.2) as shop:
        first = asyncio.create_task(shop.ask("red:1"))
        await shop.until(lambda: shop.sources._waiting == 1)
        full = await shop.ask("blue:1")
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        late = await first
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert "still being loaded" in late.text
        await shop.until(lambda: shop.sources.loaded("red:1"))
        assert await shop.answer("red:1") == alone["red"]


async def test_names_of_clients_that_leave_do_not_pile_up(open_shop: OpenShop, shelf: Shelf) -> None:
    """A load goes on without its clients: those that ask and leave cost no more than others."""
    shelf.proxy.fault("HEAD", "/manifests/", "hang", headers={"seconds": "0.5"}, times=100)
    async with open_shop(waiting=3, pulls=1) as shop:
        for number in range(3):
            left = asyncio.create_task(shop.ask(f"red:t{number}"))
            await shop.until(lambda number=number: f"red:t{number}" in shop.sources._loads)
            left.cancel()
            await asyncio.wait((left,))
        assert shop.sources._waiting == 0
        full = await shop.ask("red:t3")
        assert (full.status_code, full.headers.get("retry-after")) == (429, "1")
        shelf.proxy.faults.clear()
        await shop.until(lambda: not shop.sources._loads)
        assert (await shop.ask("red:t3")).status_code == 404


async def test_a_bad_adapter_is_refused_by_what_is_wrong_with_it_and_remembered(
    open_shop: OpenShop, shelf: Shelf, colours: dict[str, Path], tmp_path: Path
) -> None:
    bad = shutil.copytree(colours["red"], tmp_path / "bad")
    weights = bad / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:600])
    shelf.push(bad, "bad:1")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("no adapter")
    shelf.push(empty, "empty:1")
    async with open_shop(image_bytes=8_000) as shop:
        for name, reason in (
            ("bad:1", "adapter_model.safetensors is damaged or half-written"),
            ("empty:1", "holds no adapter_config.json"),
            ("grey:1", "and adapter_limits.image_bytes allows 7.8 KiB"),
        ):
            for _ in range(2):
                response = await shop.ask(name)
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (400, "adapter_refused"), response.text
                assert reason in error["message"]
                assert "/tmp" not in error["message"]
                assert shelf.proxy.host not in error["message"]
            assert shelf.lookups(name) == 1
        assert shop.metric("runtime:adapter_failures_total", reason="refused") == 3
        assert shop.served.models() == ("tiny",)


@pytest.mark.parametrize(
    ("tags", "resident", "requests"), [(32, 12, 60), pytest.param(1000, 64, 600, marks=pytest.mark.long)]
)
async def test_any_of_many_names_gets_its_own_answer(
    open_shop: OpenShop,
    shelf: Shelf,
    alone: dict[str, str],
    tmp_path: Path,
    tags: int,
    resident: int,
    requests: int,
) -> None:
    each = tags // len(COLOURS)
    for name in COLOURS:
        shelf.retag(f"{name}:1", *(f"t{number}" for number in range(each)))
    draw = random.Random(5)
    names = [f"{name}:t{number}" for number in range(each) for name in COLOURS]
    draw.shuffle(names)
    asked = draw.choices(names, [1 / rank for rank in range(1, tags + 1)], k=requests)  # Zipf
    async with open_shop(cache=tmp_path / "cache", resident=resident) as shop:
        room = asyncio.Semaphore(8)

        async def ask(name: str) -> None:
            async with room:
                assert await shop.answer(name) == alone[name.partition(":")[0]]
                assert len(shop.served.engine.stats().adapters) <= resident

        await asyncio.gather(*map(ask, asked))
        assert shelf.proxy.count("GET", "/blobs/") == 2 * len(COLOURS)  # an image is pulled once
        loads = shop.metric("runtime:adapter_load_seconds_count")
        assert shop.metric("runtime:adapter_evictions_total", place="memory") == loads - resident
        assert len(set(asked)) > resident


async def test_a_source_that_is_none_is_refused(open_shop: OpenShop) -> None:
    for source in ("r.example/x:1", "adapters", "oci:/x", "r.example/x@sha256:" + "0" * 64, "r.example/X"):
        with pytest.raises(ConfigError):
            async with open_shop(sources=(source,)):
                pass


@pytest.mark.long
@pytest.mark.parametrize(
    "engine", [{"replicas": 2}, {"parallel": "tp", "processes": 2}], ids=["replicas", "divided"]
)
async def test_answers_are_those_of_one_process_while_adapters_come_and_go(
    open_shop: OpenShop, tiny_llama_dir: Path, alone: dict[str, str], engine: dict[str, Any]
) -> None:
    config = config_of(tiny_llama_dir, adapter_sources=("127.0.0.1:9/none",), **engine)
    served = await asyncio.to_thread(loading.load, config, ACCESS)
    try:
        async with open_shop(served=served, resident=2) as shop:
            for names in (("red:1", "green:1"), ("blue:1", "red:1"), ("green:1", "tiny")):
                asked = [name for name in names for _ in range(4)]
                answers = await asyncio.gather(*map(shop.answer, asked))
                assert answers == [alone[name.partition(":")[0]] for name in asked]
            assert shop.metric("runtime:adapter_load_seconds_count") == 4
            await shop.until(lambda: len(shop.served.engine.stats().adapters) == 2)
    finally:
        await asyncio.to_thread(served.engine.close)
        served.tokenizer.close()


async def test_vllm_is_told_of_an_adapter_by_its_copy_and_of_its_leaving(
    open_shop: OpenShop, tiny_llama_dir: Path, tmp_path: Path, program: Path
) -> None:
    model = tmp_path / "model"  # where the stand-in writes what it receives
    model.mkdir()
    for file in tiny_llama_dir.iterdir():
        (model / file.name).hardlink_to(file)
    config = config_of(
        model,
        adapter_sources=("127.0.0.1:9/none",),
        engine="vllm",
        vllm={"program": str(program), "flags": {"max-model-len": 256}},
    )
    served = await asyncio.to_thread(loading.load, config, ACCESS)
    flags = json.loads((model / "flags.json").read_text())
    assert (flags["max-loras"], flags["max-lora-rank"]) == ("4", "64")
    try:
        async with open_shop(served=served, resident=1) as shop:
            for name in ("red:1", "blue:1"):
                reply = await shop.ask(name, prompt=[1, 5])
                assert reply.status_code == 200, reply.text
                (told,) = json.loads((model / "loras.json").read_text()).items()
                assert told[0].startswith(name)
                assert (Path(told[1]) / "adapter_model.safetensors").is_file()
                assert json.loads((model / "body.json").read_text())["model"] == told[0]
    finally:
        await asyncio.to_thread(served.engine.close)
        served.tokenizer.close()
