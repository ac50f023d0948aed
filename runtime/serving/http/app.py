"""Puts the routes together: `create_app` takes every collaborator, and nothing happens at import.

Here are the routes that know no model (health, metrics, version). Each other group of routes is
a module with a function `router`, included by one line below: that line and the module are what a new route
takes. Does not know how a model is loaded or when the process ends. Start at `create_app`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from runtime import __version__, utilisation
from runtime.errors import Failure
from runtime.metrics import ServingMetrics
from runtime.serving.adapter_sources.sources import AdapterSources
from runtime.serving.generation import Generator
from runtime.serving.http import admin, anthropic, chat, completions, openai, pages, responses
from runtime.serving.http.description import described
from runtime.serving.http.middleware import RequestMiddleware
from runtime.serving.http.origins import Callers
from runtime.serving.http.refusals import Refusals
from runtime.serving.http.schema import ErrorBody
from runtime.serving.http.sse import error_object, failure_reply, reply
from runtime.serving.lifecycle import Lifecycle
from runtime.serving.settings import Limits

SHOWN_PATH = 200
"""Characters of an unknown path that its refusal repeats."""
TEXT_OR_JSON: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}, "application/json": {}}}}


@dataclass(frozen=True, slots=True)
class LaterAdapters:
    """How adapters come while serving."""

    loader: admin.AdapterLoader | None = None
    """Loads from a directory those that a client asks to load; None loads none."""
    sources: AdapterSources | None = None
    """Loads from registries those that requests name."""


NO_LATER_ADAPTERS = LaterAdapters()


def create_app(
    *,
    lifecycle: Lifecycle,
    metrics: ServingMetrics,
    limits: Limits,
    callers: Callers = Callers(),  # noqa: B008 - a constant
    adapters: LaterAdapters = NO_LATER_ADAPTERS,
) -> FastAPI:
    """Return the server's routes behind its middleware."""
    app = FastAPI(
        title="Workspace runtime",
        version=__version__,
        docs_url=None,  # FastAPI's page loads its script from a CDN
        redoc_url=None,
        redirect_slashes=False,  # the middleware takes them off
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    timeout_s = limits.request_timeout_s
    generator = Generator(lifecycle, metrics, timeout_s=timeout_s, sources=adapters.sources)
    app.include_router(chat.router(generator))
    app.include_router(openai.router(generator))
    app.include_router(completions.router(generator))
    app.include_router(responses.router(generator))
    app.include_router(anthropic.router(generator))
    app.include_router(admin.router(generator, adapters.loader))
    _add_health(app, lifecycle)
    app.include_router(pages.router())
    _add_figures(app, metrics)
    _add_failures(app)
    app.openapi = partial(described_app, app)  # type: ignore[method-assign]
    app.add_middleware(
        RequestMiddleware,
        lifecycle=lifecycle,
        limits=limits,
        callers=callers,
        refusals=Refusals(metrics.refused),
    )
    return app


def described_app(app: FastAPI) -> dict[str, Any]:
    """Return what /openapi.json answers: FastAPI's description of an app, with ours put in; made once."""
    if app.openapi_schema is None:
        app.openapi_schema = described(FastAPI.openapi(app))
    return app.openapi_schema


def _add_health(app: FastAPI, lifecycle: Lifecycle) -> None:
    def answer(unhealthy: str | None, refused: Sequence[str] = ()) -> JSONResponse:
        if unhealthy is None:
            named = {"refused_adapters": list(refused)} if refused else {}
            return JSONResponse({"status": "Healthy", **named})
        error = error_object(unhealthy, 503, code="not_ready")
        body = {"status": "Unhealthy", "detail": unhealthy, "error": error}
        return JSONResponse(body, 503, {"Retry-After": "1"})

    # async, so that a probe is answered on the event loop even when every worker thread is busy

    @app.get("/livez", tags=["health"], summary="Should this process be restarted?")
    @app.get("/v2/health/live", include_in_schema=False)
    async def livez() -> JSONResponse:
        return answer(lifecycle.liveness())

    @app.get("/readyz", tags=["health"], summary="Should requests be sent here?")
    @app.get("/health", tags=["health"], summary="The same as /readyz")
    @app.get("/healthz", tags=["health"], summary="The same as /readyz")
    @app.get("/ping", include_in_schema=False)
    @app.get("/v2/health/ready", include_in_schema=False)
    async def readyz() -> JSONResponse:
        served = lifecycle.loaded
        return answer(lifecycle.readiness(), served.refused_adapters if served is not None else ())


def _add_figures(app: FastAPI, metrics: ServingMetrics) -> None:
    @app.get(
        "/metrics",
        tags=["health"],
        summary="Prometheus metrics; the machine's load as JSON for clients that accept JSON",
        response_class=PlainTextResponse,
        responses=TEXT_OR_JSON,
    )
    async def prometheus(request: Request) -> Response:
        if "application/json" in request.headers.get("accept", ""):  # as KAITO's own server answers
            return JSONResponse(await run_in_threadpool(utilisation.kaito_metrics))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["health"], summary="This server's version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _add_failures(app: FastAPI) -> None:
    async def failed(request: Request, failure: Exception) -> Response:
        return failure_reply(request.url.path, failure, request.state.request_id)

    async def refused(request: Request, failure: Exception) -> Response:
        status = failure.status_code if isinstance(failure, HTTPException) else 500
        path = request.url.path
        headers = dict(getattr(failure, "headers", None) or {})
        if status == 405:
            allowed = headers.get("Allow", "").split(", ")
            head = ["HEAD"] if "GET" in allowed else []  # which some routes name themselves
            headers["Allow"] = ", ".join(dict.fromkeys([*allowed, *head, "OPTIONS"]))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        shown = path if len(path) <= SHOWN_PATH else path[:SHOWN_PATH] + "…"
        text = {
            404: f"there is no {shown} here; GET /docs lists the routes",
            405: f"{shown} does not take {request.method}; GET /docs lists the routes",
        }.get(status, str(getattr(failure, "detail", "")))
        response = reply(path, status, error_object(text, status))
        response.headers.update(headers)
        return response

    app.add_exception_handler(Failure, failed)
    app.add_exception_handler(HTTPException, refused)
