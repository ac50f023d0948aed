"""Parts for the serving tests: a small real tokenizer, and an app over an engine without a model."""

import contextlib
import copy
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from runtime.metrics import ServingMetrics
from runtime.serving.generation_config import SamplingDefaults
from runtime.serving.http.app import LaterAdapters, create_app
from runtime.serving.http.origins import Callers
from runtime.serving.keys import KeyEntry, KeyRing
from runtime.serving.lifecycle import Lifecycle, ServedModel
from runtime.serving.settings import Limits
from runtime.serving.tokenizer import PromptTokenizer
from tests.serving.echo_engine import EchoEngine

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('no role ' ~ m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, which is what serves."""
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One tokenizer for all tests."""
    return make_tokenizer()


def make_tokenizer() -> Any:
    """A byte-level tokenizer of bytes and a few words: an emoji takes four tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the answer to the question is a word and another word"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def make_sentencepiece(*, strips: bool) -> Any:
    """A tokenizer with byte fallback, as those of Llama 2 and Phi-3 (`strips`: no first space) and Gemma."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abdehinoqrstuwx.\n", "an", "is", "the", "wor", "word", "▁is", "▁the", "▁word"]
    merges = [("a", "n"), ("i", "s"), ("t", "h"), ("th", "e"), ("w", "o"), ("wo", "r"), ("wor", "d")]
    merges += [("▁", "is"), ("▁", "the"), ("▁", "word")]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, "th", "wo"]))}
    core = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strips else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    core.decoder = decoders.Sequence(parts)
    core.add_special_tokens(["<s>", "</s>", "<|user|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


@dataclass
class Site:
    """One app and what it was made of."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: EchoEngine
    prompts: PromptTokenizer
    lifecycle: Lifecycle
    metrics: ServingMetrics
    extra: dict[str, Any] = field(default_factory=dict)

    async def chat(self, text: str = "hi", **more: Any) -> httpx.Response:
        """POST /chat with a prompt."""
        return await self.client.post("/chat", json={"prompt": text, **more})

    async def complete(self, text: str = "hi", **more: Any) -> httpx.Response:
        """POST /v1/chat/completions with one user turn."""
        body = {"model": "base", "messages": [{"role": "user", "content": text}], **more}
        return await self.client.post("/v1/chat/completions", json=body)


@dataclass
class Process:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    url: str = ""
    """Empty when the process ended before it listened."""
    log: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None
    """Reads the log."""

    @classmethod
    def start(cls, command: list[str], *, environ: Mapping[str, str] | None = None) -> "Process":
        """Run `command` in the project's folder until it listens; its log is read as long as it runs."""
        server = cls(
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=environ
            )
        )
        assert server.process.stderr is not None
        try:
            for line in server.process.stderr:
                server.log.append(line)
                if found := re.search(r"Listening on 127.0.0.1 port (\d+)", line):
                    server.url = f"http://127.0.0.1:{found[1]}"
                    break
        except BaseException:
            server.close()
            raise
        server.reader = threading.Thread(target=server._read_log, daemon=True)
        server.reader.start()
        return server

    def _read_log(self) -> None:
        """Read the log to its end; children of the server may hold it open for longer than `close` waits."""
        with contextlib.suppress(ValueError):  # it was closed
            self.log.extend(self.process.stderr or ())

    @classmethod
    def serve(cls, model: Path, *flags: str, environ: Mapping[str, str] | None = None) -> "Process":
        """Run `runtime serve MODEL` on a free port until it listens."""
        program = "import sys; from runtime.cli.main import run; sys.exit(run(sys.argv[1:], {}))"
        command = [sys.executable, "-c", program, "serve", str(model), *flags]
        return cls.start([*command, "--host", "127.0.0.1", "--port", "0"], environ=environ)

    def close(self) -> None:
        """Kill what still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.reader is not None:
            self.reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def get(self, path: str) -> httpx.Response:
        """GET one path on a connection of its own."""
        return httpx.get(self.url + path, timeout=60)

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until /readyz says yes."""
        until(lambda: self.get("/readyz").status_code == 200, timeout_s)

    def running(self) -> float:
        """Return the requests being generated, as /metrics says."""
        return float(
            re.findall(r"^vllm:num_requests_running\S* (\S+)", self.get("/metrics").text, re.MULTILINE)[0]
        )

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def until(condition: Callable[[], bool], timeout_s: float = 60) -> float:
    """Wait for `condition` and return how long it took; AssertionError when it does not come."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - started


def start_fake_server(*, ready: bool = True, files: int | None = None, **options: Any) -> Process:
    """Start `fake_server` with options and return it once it listens, or is ready; `files` may be open."""
    command = [sys.executable, "-m", "tests.serving.fake_server", json.dumps(options)]
    if files is not None:
        command = ["bash", "-c", f'ulimit -n {files}; exec "$0" "$@"', *command]
    site = Process.start(command)
    try:
        assert site.url, f"no server: {site.log}"
        if ready:
            site.wait_ready()
    except BaseException:
        site.close()
        raise
    return site


@pytest.fixture
def start_server() -> Iterator[Callable[..., Process]]:
    """Return a function that starts `fake_server` and waits until it is ready."""
    started: list[Process] = []

    def start(**options: Any) -> Process:
        started.append(start_fake_server(**options))
        return started[-1]

    yield start
    for site in started:
        site.close()


OpenSite = Callable[..., Any]


@pytest.fixture
def open_site(tokenizer: Any) -> OpenSite:
    """Return a context manager that opens an app in this process, over ASGI."""

    @asynccontextmanager
    async def open_(
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
        keys: tuple[KeyEntry, ...] | None = None,
        origins: frozenset[str] = frozenset(),
        hosts: frozenset[str] | None = None,
        defaults: SamplingDefaults | None = None,
        ready: bool = True,
        template: str | None = TEMPLATE,
        tokenizer: Any = tokenizer,
        adapter_loader: Any = None,
        stall_s: float = 60,
        **engine: Any,
    ) -> AsyncIterator[Site]:
        running = EchoEngine(**engine)
        limits = limits or Limits()
        used = copy.copy(tokenizer)
        used.chat_template = template
        prompts = PromptTokenizer(
            used,
            context_tokens=running.context_tokens,
            new_tokens=16,
            stop_ids=frozenset({tokenizer.eos_token_id}),
            defaults=defaults or SamplingDefaults(),
        )
        lifecycle = Lifecycle(stall_s=stall_s, capacity=limits.rows + limits.queue)
        ring = KeyRing(api_key, keys) if api_key or keys else None
        metrics = ServingMetrics("base", running.stats, ring.figures if ring else dict)
        app = create_app(
            lifecycle=lifecycle,
            metrics=metrics,
            limits=limits,
            callers=Callers(ring, origins, hosts),
            adapters=LaterAdapters(adapter_loader),
        )
        if ready:
            lifecycle.ready(ServedModel(name="base", engine=running, tokenizer=prompts, created=1))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield Site(app, client, running, prompts, lifecycle, metrics)
        prompts.close()

    return open_


Serve = Callable[..., Process]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Calls `Process.serve`, and kills in the end what still runs."""
    with ExitStack() as started:

        def start(model: Path, *flags: str, environ: Mapping[str, str] | None = None) -> Process:
            site = Process.serve(model, *flags, environ=environ)
            started.callback(site.close)
            return site

        yield start
