"""The pages for browsers, and the scripts and styles that they load: files of the package, read once.

A page's policy lets it load from this server only, run only scripts that are files here, and make no HTML out
of text: what a model or a stored conversation says can neither run nor load anything. Start at `router`.
"""

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

ASSETS = {
    **dict.fromkeys(["chat.css", "docs.css"], "text/css"),
    **dict.fromkeys(
        [
            "answers.js",
            "chat.js",
            "columns.js",
            "docs.js",
            "dom.js",
            "exports.js",
            "list.js",
            "markdown.js",
            "marked/marked.esm.js",
            "requests.js",
            "settings.js",
            "store.js",
        ],
        "text/javascript",
    ),
}
"""What the pages load, by its name below /page/, with its type."""
ASSET_PATHS = frozenset(f"/page/{name}" for name in ASSETS)
"""Read without the key: the same files on every server."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HTML_OR_JSON: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/html": {}, "application/json": {}}}
}


def router() -> APIRouter:
    """Return the routes of the pages and of their files."""
    routes = APIRouter(tags=["health"])

    @routes.get("/", summary="The chat page for browsers, a sign of life for others", responses=HTML_OR_JSON)
    async def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return page("index.html", request)
        return JSONResponse({"message": "Server is running"}, headers={"Vary": "Accept"})

    @routes.get("/docs", summary="This page", response_class=HTMLResponse)
    async def docs(request: Request) -> Response:
        return page("docs.html", request)

    @routes.get("/page/{name:path}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        if name not in ASSETS:
            raise HTTPException(404)
        return reply(name, f"{ASSETS[name]}; charset=utf-8", request, {})

    return routes


def page(name: str, request: Request) -> Response:
    """Answer with a page of the package."""
    return reply(
        name, "text/html; charset=utf-8", request, {"Content-Security-Policy": POLICY, "Vary": "Accept"}
    )


def reply(name: str, kind: str, request: Request, headers: dict[str, str]) -> Response:
    """Answer with a file, or 304 where the browser has it, which asks each time: servers are updated."""
    body, tag = content(name)
    headers = {
        **headers,
        "ETag": tag,
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    known = request.headers.get("if-none-match", "")
    if tag in (given.strip().removeprefix("W/") for given in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


@cache
def content(name: str) -> tuple[bytes, str]:
    """Return a file of the package and its tag."""
    body = files("runtime.serving.http").joinpath("page", *name.split("/")).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
