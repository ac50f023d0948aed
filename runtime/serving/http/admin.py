"""Routes next to generation: token ids for text and back, adapters loaded and unloaded while serving.

Loading is off unless the server has an API key and an adapter directory, and takes nothing from outside
that directory. Start at `router`.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from runtime.errors import ConfigError, Failure, ForbiddenError, RequestError, UnknownModelError
from runtime.serving.adapter_sources.sources import failure_reason
from runtime.serving.generation import Generator
from runtime.serving.http import fields
from runtime.serving.http.body import BodyRoute
from runtime.serving.http.body_types import Body, Flag, Name, Text, TokenIds
from runtime.serving.http.messages import Messages, turns_of
from runtime.serving.http.template_fields import TemplateFields, template_options
from runtime.serving.http.tool_fields import ToolFields, shown_tools
from runtime.serving.lifecycle import ServedModel
from runtime.serving.settings import ADAPTER_NAME, AdapterSource

log = logging.getLogger(__name__)


class TokenizeBody(TemplateFields, ToolFields):
    """POST /tokenize: a `prompt`, or `messages` with all that /v1/chat/completions shows to the model."""

    treatments = fields.TOKENIZE

    model: Name | None = None
    """An adapter may have a chat template of its own."""
    prompt: Text | None = None
    messages: Messages | None = None
    return_token_strs: Flag = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    treatments = fields.PLAIN

    tokens: TokenIds


class LoadBody(Body):
    """POST /v1/load_lora_adapter."""

    treatments = fields.PLAIN

    lora_name: str = Field(pattern=ADAPTER_NAME)
    lora_path: Text = Field(max_length=4096)
    """A directory, relative to the server's adapter directory or absolute within it."""


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    treatments = fields.PLAIN

    lora_name: Name


@dataclass(frozen=True, slots=True)
class AdapterLoader:
    """Where adapters may be loaded from at run time, and the function that loads one."""

    root: Path
    add: Callable[[ServedModel, AdapterSource], None]
    """Blocks while it reads; raises ConfigError for an adapter that must not be served."""

    def folder(self, path: str) -> Path:
        """Return the directory at `path`; RequestError when it lies outside the root, links followed."""
        root = self.root.resolve()
        try:
            folder = (root / path).resolve()
            inside = folder.is_relative_to(root) and folder != root and folder.is_dir()
        except (ValueError, OSError):  # a NUL, or a name too long for the file system
            inside = False
        if not inside:
            raise RequestError("'lora_path' is no directory within the adapter directory", param="lora_path")
        return folder


def router(generator: Generator, adapter_loader: AdapterLoader | None) -> APIRouter:
    """Return the routes; `adapter_loader` None refuses to load and unload."""
    routes = APIRouter(tags=["tools"], route_class=BodyRoute)
    _add_tokenizer_routes(routes, generator)
    _add_adapter_routes(routes, generator, adapter_loader)
    return routes


def _add_tokenizer_routes(routes: APIRouter, generator: Generator) -> None:
    @routes.post("/tokenize", summary="Token ids of a text or a conversation", response_model=None)
    async def tokenize(body: TokenizeBody) -> Response:
        tokenizer = generator.served().tokenizer
        adapter = await generator.adapter_for(body.model)
        ids = await _token_ids(body, generator.served(), adapter)
        strings = await tokenizer.token_texts(ids) if body.return_token_strs else None
        counted = {"count": len(ids), "max_model_len": tokenizer.context_tokens, "tokens": ids}
        return JSONResponse({**counted, "token_strs": strings})

    @routes.post("/detokenize", summary="The text of token ids", response_model=None)
    async def detokenize(body: DetokenizeBody) -> Response:
        tokenizer = generator.served().tokenizer
        return JSONResponse({"prompt": await tokenizer.detokenize(body.tokens)})


async def _token_ids(body: TokenizeBody, served: ServedModel, adapter: str | None) -> list[int]:
    tokenizer = served.tokenizer_for(adapter)
    if body.messages:
        if body.prompt:
            raise RequestError("send 'prompt' or 'messages', not both", param="prompt")
        options = template_options(body, tokenizer, shown_tools(body, served, adapter))
        return await tokenizer.tokenize_chat(
            turns_of(body.messages, tokenizer.features_for(options)), options=options
        )
    if body.prompt is None:
        raise RequestError("send 'prompt' or 'messages'", param="prompt")
    for name in ("tools", "documents", "chat_template_kwargs", "continue_final_message"):
        if getattr(body, name):
            raise RequestError(f"'{name}' is for 'messages'; a 'prompt' is taken as it stands", param=name)
    return await tokenizer.tokenize_text(body.prompt, special=body.add_special_tokens is not False)


def _add_adapter_routes(routes: APIRouter, generator: Generator, loader: AdapterLoader | None) -> None:
    one_change_at_a_time = asyncio.Lock()

    def allowed() -> AdapterLoader:
        if loader is None:
            raise ForbiddenError("adapters are fixed here: loading needs an API key and an adapter directory")
        return loader

    @routes.post("/v1/load_lora_adapter", summary="Serve one more adapter", response_model=None)
    async def load(body: LoadBody) -> Response:
        served, adapter_loader = generator.served(), allowed()
        source = AdapterSource(name=body.lora_name, reference=str(adapter_loader.folder(body.lora_path)))
        async with one_change_at_a_time:
            try:
                await asyncio.to_thread(adapter_loader.add, served, source)
            except Failure as failure:
                generator.metrics.adapter_failed(failure_reason(failure))
                if not isinstance(failure, ConfigError):
                    raise
                raise RequestError(str(failure), param="lora_path") from None
        return JSONResponse({"message": f"adapter '{body.lora_name}' is served"})

    @routes.post("/v1/unload_lora_adapter", summary="Stop serving an adapter", response_model=None)
    async def unload(body: UnloadBody) -> Response:
        served = generator.served()
        allowed()
        if generator.sources is not None and await generator.sources.drop(served, body.lora_name):
            return JSONResponse({"message": f"adapter '{body.lora_name}' leaves memory"})
        async with one_change_at_a_time:
            if body.lora_name not in served.engine.stats().adapters:
                raise UnknownModelError(
                    f"no adapter '{body.lora_name}' is served", param="lora_name", code="model_not_found"
                )
            await asyncio.to_thread(served.remove_adapter, body.lora_name)
        log.info("Adapter removed: %s", body.lora_name)
        return JSONResponse({"message": f"adapter '{body.lora_name}' is served no more"})
