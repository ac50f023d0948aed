"""The engine over vLLM: a vLLM server that this process starts does the work, on one GPU or several.

Requests wait in the request queue, as with the other engines; at most `max_sequences` at a time are sent to
vLLM's /v1/completions, with token ids in and out. Knows vLLM's HTTP; does not know text, or how vLLM is run
(vllm_process.py). Start at `start`, then `VllmEngine._stream`.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from runtime import adapters, hardware, net
from runtime.errors import RequestError, UnavailableError, UnknownModelError, one_line
from runtime.hardware import Hardware
from runtime.serving.engine import failures
from runtime.serving.engine.backends.vllm_process import VllmProcess
from runtime.serving.engine.protocol import JSON_STYLE, Constraint, FinishReason, Request, Stats, Token
from runtime.serving.engine.request_queue import LAST_STEP_S, RequestHandle, RequestQueue
from runtime.serving.settings import ServeConfig

log = logging.getLogger(__name__)

SWEEP_S = 0.05
"""How often cancelled requests are looked for."""
ADAPTER_S = 600.0
"""For vLLM to read one adapter."""
LORA_RANK = 64
"""Largest rank of an adapter where the settings name none; vLLM reserves memory for it."""
LATER_ADAPTERS = 4
"""Adapters that a step of vLLM's may use where they are loaded while serving; it reserves their memory."""
HOST_ADAPTERS = 64
"""Adapters that vLLM keeps in host memory; a further one is read from the disk for each request."""
TOKEN = "token_id:"  # noqa: S105 - how vLLM writes a token's id where its text would stand
SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Fields of `Sampling` that vLLM takes under the same name and in the same sense."""
REFUSED = ("no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id")
"""Fields of `Sampling` for which vLLM has nothing."""


def start(config: ServeConfig, folder: Path, devices: Hardware) -> "VllmEngine":
    """Return the engine over a vLLM that serves the model in `folder`; blocks until it answers.

    Raises ConfigError when there is no vLLM, when it cannot do what `config` asks for, or when it ends.
    """
    server = VllmProcess(config.vllm.program, [str(folder), *flags(config, devices)])
    try:
        server.wait_ready()
        with server.client(timeout_s=30.0) as client:
            served = client.get("/v1/models").raise_for_status().json()["data"][0]
    except BaseException:
        server.close()
        raise
    return VllmEngine(
        server,
        name=config.served_name,
        context_tokens=int(served["max_model_len"]),
        max_sequences=config.replicas * config.limits.rows,
        max_waiting=config.replicas * config.limits.queue,
    )


def flags(config: ServeConfig, devices: Hardware) -> list[str]:
    """Return vLLM's flags for `config`; those of `config.vllm.flags` win.

    Raises ConfigError for a quantisation that vLLM does not make itself.
    """
    chosen: dict[str, Any] = {
        "served-model-name": config.served_name,
        "dtype": hardware.compute_dtype(devices, config.model.dtype),
        "max-num-seqs": config.limits.rows,
        "generation-config": "vllm",  # what a request does not set is decided here
        "enable-prompt-tokens-details": True,
        "structured-outputs-config": '{"backend": "guidance", "disable_any_whitespace": true}',
    }
    if config.limits.context_tokens is not None:
        chosen["max-model-len"] = config.limits.context_tokens
    if config.parallel == "tp":
        chosen["tensor-parallel-size"] = config.processes or devices.count
    if config.replicas > 1:
        chosen["data-parallel-size"] = config.replicas
    if config.model.trust_remote_code:
        chosen["trust-remote-code"] = True
    later = bool(config.adapter_sources) or config.adapter_root is not None
    if config.adapters or later:
        at_once = max(len(config.adapters), LATER_ADAPTERS if later else 1)
        rank = config.max_lora_rank or LORA_RANK
        chosen |= {"enable-lora": True, "max-loras": at_once, "max-lora-rank": rank}
        sourced = config.adapter_limits.resident if config.adapter_sources else 0
        chosen["max-cpu-loras"] = max(at_once, HOST_ADAPTERS, len(config.adapters) + sourced)
    if config.quantization is not None:
        chosen["quantization"] = "bitsandbytes"  # 4 bits: settings.check refuses others
    if config.limits.gpu_memory_share is not None:
        chosen["gpu-memory-utilization"] = config.limits.gpu_memory_share
    chosen |= {name.replace("_", "-").lstrip("-"): value for name, value in config.vllm.flags.items()}
    return [_flag(name, value) for name, value in chosen.items()]


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value if isinstance(value, str | int | float) else json.dumps(value)}"


class VllmEngine:
    """Answers up to `max_sequences` requests at a time; `max_waiting` more wait, in order of arrival."""

    def __init__(
        self, server: VllmProcess, *, name: str, context_tokens: int, max_sequences: int, max_waiting: int
    ) -> None:
        """`name` is what vLLM calls the base model."""
        self.context_tokens = context_tokens
        self.max_sequences = max_sequences
        self._server = server
        self._name = name
        self._loaded: dict[str, Path] = {}
        self._folders = tempfile.TemporaryDirectory(prefix="adapters-")
        self._queue = RequestQueue(
            max_running=max_sequences, max_waiting=max_waiting, adapters=lambda: tuple(self._loaded)
        )
        self._tasks: dict[RequestHandle, asyncio.Task[None]] = {}
        self._kv_share, self._cache_tokens, self._replicas = 0.0, 0, 1
        self._prompt_tokens = self._cached_tokens = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="engine", daemon=True)
        self._thread.start()
        server.on_end(self._process_ended)

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request`; see `Engine.submit`. RequestError for what vLLM cannot do."""
        sampling = request.sampling
        refused = [name for name in REFUSED if getattr(sampling, name)]
        if sampling.bad_words_ids and not sampling.bad_words:
            refused.append("bad_words_ids")
        if not sampling.max_new_tokens:
            raise RequestError(
                "'max_tokens' 0 is not supported by vLLM, which serves this model", param="max_tokens"
            )
        if sampling.prompt_logprobs:
            raise RequestError(
                "'logprobs' of the prompt ('echo') are not supported by vLLM, which serves this model",
                param="logprobs",
            )
        for name in refused:
            raise RequestError(f"'{name}' is not supported by vLLM, which serves this model", param=name)
        return self._queue.submit(request)

    def cancel(self, request_id: str) -> None:
        """Stop a request; see `Engine.cancel`."""
        self._queue.cancel(request_id)

    def add_adapter(self, name: str, folder: Path, *, strength: float = 1.0) -> None:
        """Have vLLM read an adapter, of which a copy is kept for it; see `Engine.add_adapter`."""
        copy = Path(self._folders.name) / name
        shutil.rmtree(copy, ignore_errors=True)
        fields = adapters.check(folder, name=name).fields
        if strength == 1 and not fields.rank_pattern and not fields.alpha_pattern:
            copy.mkdir(parents=True)
            for file in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
                shutil.copyfile(folder / file, copy / file)
        else:  # vLLM knows no strength, and one rank and alpha for all modules
            adapters.combine([(folder, strength)], copy)
        try:
            self._post("load_lora_adapter", name, lora_path=str(copy))
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            raise
        self._loaded[name] = copy

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter once no request uses it; see `Engine.remove_adapter`."""
        self._queue.drain_adapter(name)
        self._post("unload_lora_adapter", name)
        shutil.rmtree(self._loaded.pop(name), ignore_errors=True)
        self._queue.adapter_removed(name)

    def stats(self) -> Stats:
        """Return the figures of this moment; the cache's share is a second old at most."""
        stats = self._queue.stats(
            kv_cache_share=self._kv_share if self._queue.running else 0.0,
            alive=self._thread.is_alive() and self._server.alive,
        )
        return replace(
            stats,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            max_sequences=self.max_sequences,
            cache_tokens=self._cache_tokens,
            replicas=self._replicas,
        )

    def close(self) -> None:
        """End what is in flight as cancelled, then vLLM."""
        self._queue.close("cancelled")
        self._thread.join(LAST_STEP_S)
        self._server.close()
        self._folders.cleanup()

    def abort(self) -> None:
        """Give up at once; see `Engine.abort`."""
        self._queue.abort(failures.died())

    async def _run(self) -> None:
        async with self._server.async_client() as client:
            watch = asyncio.create_task(self._watch(client))
            while self._queue.is_open:
                for handle in await asyncio.to_thread(self._queue.take, wait=True):
                    self._tasks[handle] = asyncio.create_task(self._answer(client, handle))
            for task in (watch, *self._tasks.values()):
                task.cancel()
            await asyncio.gather(watch, *self._tasks.values(), return_exceptions=True)

    async def _watch(self, client: httpx.AsyncClient) -> None:
        """End cancelled requests, also before their first token; read how full the cache is."""
        for sweep in range(2**63):
            await asyncio.sleep(SWEEP_S)
            for handle, task in tuple(self._tasks.items()):
                if handle.cancelled:
                    task.cancel()
            if (self._tasks or not self._cache_tokens) and sweep % round(1 / SWEEP_S) == 0:
                with contextlib.suppress(httpx.HTTPError):
                    self._read_metrics((await client.get("/metrics", timeout=1.0)).text)

    def _read_metrics(self, text: str) -> None:
        """Take the cache's size and how full it is, over all of vLLM's engine processes."""
        shares, tokens, replicas = [0.0], 0, 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:kv_cache_usage_perc":
                    shares.append(sample.value)
                if sample.name == "vllm:cache_config_info":
                    replicas += 1
                    blocks, size = (
                        sample.labels.get("num_gpu_blocks", ""),
                        sample.labels.get("block_size", ""),
                    )
                    tokens += int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else 0
        self._kv_share, self._cache_tokens, self._replicas = max(shares), tokens, max(1, replicas)

    async def _answer(self, client: httpx.AsyncClient, handle: RequestHandle) -> None:
        """Give one request its tokens and its end."""
        try:
            end: FinishReason | Exception = await self._stream(client, handle)
        except asyncio.CancelledError:
            end = "cancelled"
        except Exception as error:  # answers the request; the others go on
            end = failures.of(error)
        del self._tasks[handle]
        self._queue.finish(handle, end)

    async def _stream(self, client: httpx.AsyncClient, handle: RequestHandle) -> FinishReason:
        """Post the answer's tokens as vLLM sends them and return why it ended."""
        request = handle.request
        self._prompt_tokens += len(request.prompt_ids)
        body = _body(request, model=request.adapter or self._name, context_tokens=self.context_tokens)
        end: FinishReason = "cancelled"
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                raise _refused(reply.status_code, (await reply.aread()).decode(errors="replace"))
            async for data in net.async_events(reply.aiter_bytes()):
                if data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _refused(int(chunk["error"].get("code") or 500), data)
                self._cached_tokens += _cached(chunk)
                self._queue.note_progress()
                for choice in chunk["choices"]:
                    for token in _tokens(choice, top=request.sampling.top_logprobs):
                        if token.id not in request.sampling.stop_ids:
                            handle.post(token)
                    end = _reason(choice.get("finish_reason")) or end
        return end

    def _process_ended(self, how: str) -> None:
        log.error("%s; without it nothing can be answered", how)
        self.abort()

    def _post(self, path: str, name: str, **more: str) -> None:
        """Have vLLM load or unload an adapter; ConfigError with its reason when it does not."""
        try:
            with self._server.client(timeout_s=ADAPTER_S) as client:
                reply = client.post(f"/v1/{path}", json={"lora_name": name} | more)
        except httpx.HTTPError as error:
            raise UnavailableError(f"adapter {name}: vLLM does not answer: {error}") from None
        if reply.status_code != 200:
            raise failures.does_not_fit(name, f"vLLM: {_message(reply.text)}")


def _body(request: Request, *, model: str, context_tokens: int) -> dict[str, Any]:
    """Return the body of a request to vLLM: our stop ids and no others, ids in place of text."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt_ids,
        "max_tokens": min(sampling.max_new_tokens, context_tokens - len(request.prompt_ids)),
        "min_tokens": sampling.min_new_tokens,
        **{name: getattr(sampling, name) for name in SAME_NAME},
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
        "stop_token_ids": sorted(sampling.stop_ids),
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.allowed_token_ids is not None:
        body["allowed_token_ids"] = list(sampling.allowed_token_ids)
    if sampling.bad_words:
        body["bad_words"] = list(sampling.bad_words)
    if sampling.seed is not None:
        body["seed"] = sampling.seed & (1 << 63) - 1
    if sampling.top_logprobs is not None:
        body |= {"logprobs": sampling.top_logprobs, "return_tokens_as_token_ids": True}
    if sampling.grammar is not None:
        constraint = sampling.grammar.constraint
        if constraint.kind == "answer":
            body["structured_outputs"] = {"grammar": _lark(constraint)}
        else:
            name = "json" if constraint.kind == "schema" else constraint.kind
            body["structured_outputs"] = {name: constraint.value}
        if constraint.whitespace is not None:
            body["structured_outputs"]["whitespace_pattern"] = constraint.whitespace
    return body


def _lark(constraint: Constraint) -> str:
    """Return the grammar of an answer with its parts, for a vLLM that follows grammars by llguidance."""
    rules = [constraint.value["top"]]
    for number, part in enumerate(constraint.value["parts"]):
        if part["kind"] == "schema":
            schema = part["value"] if isinstance(part["value"], dict) else {}
            rules.append(f"part{number}: %json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}")
        elif part["kind"] == "regex":
            pattern = part["value"].replace("/", r"\/")
            rules.append(f"part{number}: /{pattern}/")
        else:
            raise RequestError(
                f"'{constraint.param}' is a grammar, which vLLM cannot follow behind a thought; "
                "send a schema, or a pattern",
                param=constraint.param,
            )
    return "\n".join(rules)


def _tokens(choice: dict[str, Any], *, top: int | None) -> Iterator[Token]:
    """Yield the tokens of one chunk, each with its `top` likeliest alternatives where they are wanted."""
    ids = choice.get("token_ids") or []
    logprobs = choice.get("logprobs")
    if top is None or logprobs is None:
        yield from map(Token, ids)
        return
    for index, token in enumerate(ids):
        pairs = (
            (int(name.removeprefix(TOKEN)), logprob)
            for name, logprob in logprobs["top_logprobs"][index].items()
        )
        likeliest = sorted(pairs, key=lambda pair: -pair[1])[:top]
        yield Token(token, logprob=logprobs["token_logprobs"][index], top=tuple(likeliest))


def _reason(finish_reason: str | None) -> FinishReason | None:
    if finish_reason is None:
        return None
    if finish_reason not in {"stop", "length"}:
        raise UnavailableError(f"vLLM aborted this request ({finish_reason})")
    return "stop" if finish_reason == "stop" else "length"


def _cached(chunk: dict[str, Any]) -> int:
    details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _refused(status: int, text: str) -> Exception:
    """Return the failure that an error response of vLLM means."""
    if status == 404:
        return UnknownModelError(_message(text))
    if status in {400, 422}:
        return RequestError(_message(text))
    return RuntimeError(f"vLLM answered {status}: {_message(text)}")


def _message(text: str) -> str:
    """Return the message in an error body, in one line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return one_line(text)
