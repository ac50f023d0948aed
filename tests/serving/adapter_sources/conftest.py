"""A real registry with adapters, and an app over the tiny model that loads them by name."""

import asyncio
import dataclasses
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime import oci
from runtime.metrics import ServingMetrics
from runtime.model_source import ModelSource
from runtime.serving import loading
from runtime.serving.adapter_sources.sources import AdapterSources
from runtime.serving.http.app import LaterAdapters, create_app
from runtime.serving.lifecycle import Lifecycle, ServedModel
from runtime.serving.settings import AdapterLimits, Limits, ServeConfig
from tests.faults.registry import FaultyRegistry
from tests.oci.conftest import Started, open_registry, registry_program
from tests.serving.engine.calls import save_adapter

__all__ = ["open_registry", "registry_program"]

ACCESS = oci.Access(files=(), backoff_s=0.05)
QUESTION = {"prompt": "the colour is", "max_tokens": 8, "min_tokens": 8, "temperature": 0}
COLOURS = {"red": 2, "green": 3, "blue": 5, "grey": 6}
"""Names and seeds of adapters whose greedy answers differ in text."""


@pytest.fixture(scope="session")
def colours(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Different adapters of the tiny model."""
    root = tmp_path_factory.mktemp("colours")
    for name, seed in COLOURS.items():
        save_adapter(
            tiny_llama_dir, root / name, rank=4 + 2 * (seed % 4), targets=["q_proj", "v_proj"], seed=seed
        )
    return {name: root / name for name in COLOURS}


@dataclasses.dataclass
class Shelf:
    """A folder of a registry, behind a proxy that a test can tell what to break."""

    host: str
    """Of the registry itself."""
    proxy: FaultyRegistry
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        return f"{self.proxy.host}/team/adapters"

    def push(self, folder: Path, name: str) -> None:
        """Push the files of `folder` as `name` below the source."""
        reference = oci.parse(f"{self.host}/team/adapters/{name}")
        self.digests[name] = oci.push(folder, reference, access=ACCESS)

    def retag(self, name: str, *tags: str) -> None:
        """Let further tags name what `name` does."""
        repository, _, tag = name.partition(":")
        url = f"http://{self.host}/v2/team/adapters/{repository}/manifests/"
        kind = "application/vnd.oci.image.manifest.v1+json"
        with urllib.request.urlopen(urllib.request.Request(url + tag, headers={"Accept": kind})) as answer:
            manifest = answer.read()
        for each in tags:
            request = urllib.request.Request(
                url + each, data=manifest, method="PUT", headers={"Content-Type": kind}
            )
            urllib.request.urlopen(request).close()

    def lookups(self, name: str = "") -> int:
        """Return how often tags were looked up."""
        path = f"/{name.replace(':', '/manifests/')}$" if name else "/manifests/"
        return self.proxy.count("HEAD", path)


@pytest.fixture(scope="session")
def stocked(open_registry: Started, colours: dict[str, Path]) -> dict[str, str]:
    """The registry's digests of the colours, each under the tags 1 and latest."""
    shelf = Shelf(open_registry.host, None)  # type: ignore[arg-type]
    for name, folder in colours.items():
        for tag in ("1", "latest"):
            shelf.push(folder, f"{name}:{tag}")
    return shelf.digests


@pytest.fixture
def shelf(open_registry: Started, stocked: dict[str, str]) -> Iterator[Shelf]:
    proxy = FaultyRegistry()
    proxy.upstream = open_registry.port
    yield Shelf(open_registry.host, proxy, dict(stocked))
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="session")
def tiny(tiny_llama_dir: Path) -> Iterator[ServedModel]:
    """The tiny model behind the real engine; each test takes out the adapters that it loads."""
    served = loading.load(config_of(tiny_llama_dir), ACCESS)
    yield served
    served.engine.close()
    served.tokenizer.close()


def config_of(model: Path, **settings: Any) -> ServeConfig:
    return ServeConfig(
        model=ModelSource(name="tiny", path=model),
        served_name="tiny",
        limits=Limits(rows=8, queue=64, context_tokens=256),
        **settings,
    )


@dataclasses.dataclass
class Shop:
    """An app that loads adapters by name, and its parts."""

    client: httpx.AsyncClient
    sources: AdapterSources
    served: ServedModel
    metrics: ServingMetrics
    now: list[float]
    """The sources' clock; a test may set it forward."""

    async def ask(self, model: str, **more: Any) -> httpx.Response:
        """Request a greedy answer."""
        return await self.client.post("/v1/completions", json={**QUESTION, "model": model, **more})

    async def answer(self, model: str) -> str:
        response = await self.ask(model)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == model
        return str(response.json()["choices"][0]["text"])

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a sample."""
        from prometheus_client.parser import text_string_to_metric_families

        found = [
            sample.value
            for family in text_string_to_metric_families(self.metrics.text().decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


OpenShop = Callable[..., Any]


@pytest.fixture
def open_shop(tiny: ServedModel, tiny_llama_dir: Path, shelf: Shelf) -> OpenShop:
    """Return a context manager that opens an app whose source is the shelf, with these limits."""

    @asynccontextmanager
    async def open_(
        *,
        cache: Path | None = None,
        sources: tuple[str, ...] = (),
        access: oci.Access = ACCESS,
        served: ServedModel = tiny,
        **limits: Any,
    ) -> AsyncIterator[Shop]:
        config = config_of(
            tiny_llama_dir,
            adapter_sources=sources or (shelf.source,),
            adapter_cache=cache,
            adapter_limits=AdapterLimits(**limits),
        )
        lifecycle, metrics, now = Lifecycle(), ServingMetrics("tiny", served.engine.stats), [0.0]
        adapters = AdapterSources(
            config,
            attach=partial(loading.attach, config=config),
            access=access,
            metrics=metrics,
            clock=lambda: now[0],
        )
        app = create_app(
            lifecycle=lifecycle, metrics=metrics, limits=Limits(), adapters=LaterAdapters(sources=adapters)
        )
        lifecycle.ready(served)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                yield Shop(client, adapters, served, metrics, now)
        finally:
            adapters.close()
            for name in served.engine.stats().adapters:
                await asyncio.to_thread(served.remove_adapter, name)

    return open_


@pytest.fixture(scope="session")
def alone(tiny: ServedModel, tiny_llama_dir: Path, colours: dict[str, Path]) -> dict[str, str]:
    """The greedy answer of each adapter where it is the only one, by colour, and of the base model."""

    async def ask() -> dict[str, str]:
        lifecycle = Lifecycle()
        lifecycle.ready(tiny)
        app = create_app(
            lifecycle=lifecycle, metrics=ServingMetrics("tiny", tiny.engine.stats), limits=Limits()
        )
        transport = httpx.ASGITransport(app=app)
        answers = {}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            for name, folder in {**colours, "tiny": None}.items():
                if folder is not None:
                    await asyncio.to_thread(tiny.engine.add_adapter, name, folder)
                response = await client.post("/v1/completions", json={**QUESTION, "model": name})
                answers[name] = response.json()["choices"][0]["text"]
                if folder is not None:
                    await asyncio.to_thread(tiny.remove_adapter, name)
        return answers

    answers = asyncio.run(ask())
    assert len(set(answers.values())) == len(answers), "adapters that answer alike prove nothing"
    return answers
