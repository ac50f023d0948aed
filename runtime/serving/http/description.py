"""What /openapi.json says of each route beside its fields: its purpose, an example, an answer, its errors.

The page at /docs and docs/api.md are made of that, and tests send every example: a route that has no entry
here fails them. Does not know what a route does. Start at `ROUTES` and `described`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.serving.http.middleware import KEYLESS_PATHS

BASE = "http://localhost:8080"
"""The server's address in examples."""

ERRORS: Mapping[int, str] = {
    400: "the body is wrong: `error.message` says what, `error.param` names the field",
    401: "no valid key",
    403: "not offered by this server, not for this key, or not for a page of that origin",
    404: "no such model, or no such route",
    408: "body or answer took too long",
    413: "the body is too large",
    415: "the body is of another type than JSON, or compressed in an unknown way",
    429: "the queue is full, or the key's minute is used up; `Retry-After` says how long",
    500: "a fault of the server; its log has it under the answer's `x-request-id`",
    503: "loading, or shutting down; `Retry-After` says how long",
    507: "out of memory",
}
"""What a status means, on every route."""
READING = (401, 503)
GENERATING = (400, 401, 404, 408, 413, 415, 429, 500, 503, 507)
TOOLS = (400, 401, 404, 413, 415, 429, 503)
ADMIN = (400, 401, 403, 404, 413, 415, 429, 503)


@dataclass(frozen=True, slots=True)
class Route:
    """What is said of one operation."""

    text: str
    answer: Any
    """An example of it: an object of JSON, or text."""
    body: Mapping[str, Any] | None = None
    errors: tuple[int, ...] = ()
    path: str = ""
    """The example's path, where the route's has a parameter."""
    refused: int | None = None
    """The status of the example on a server that has not what it names."""


_USAGE = {"prompt_tokens": 13, "completion_tokens": 7, "total_tokens": 20}
_MODEL = {"id": "base", "object": "model", "created": 1796000000, "owned_by": "workspace"}
_ALIVE = {"status": "Healthy"}

ROUTES: Mapping[tuple[str, str], Route] = {
    ("post", "/chat"): Route(
        "One prompt or a whole conversation. Send `prompt` or `messages`. With `stream` the answer comes as "
        "server-sent events that end with `[DONE]`.",
        body={"prompt": "What is a gearbox?", "max_new_tokens": 64},
        answer={"Result": "A gearbox …", "model": "base", "finish_reason": "stop", "usage": _USAGE},
        errors=GENERATING,
    ),
    ("post", "/v1/chat/completions"): Route(
        "OpenAI's chat completions, with tools, structured answers, log probabilities and reasoning. With "
        "`stream` the answer comes as chunks, and `[DONE]`; an error in between is an event with `error`.",
        body={"messages": [{"role": "user", "content": "What is a gearbox?"}], "max_tokens": 64},
        answer={
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1796000000, "model": "base",
            "choices": [
                {
                    "index": 0, "message": {"role": "assistant", "content": "A gearbox …"},
                    "finish_reason": "stop",
                }
            ],
            "usage": _USAGE,
        },
        errors=GENERATING,
    ),
    ("post", "/v1/completions"): Route(
        "OpenAI's completions: continues texts or token ids without a chat template.",
        body={"prompt": "Once upon a time", "max_tokens": 32},
        answer={
            "id": "cmpl-1", "object": "text_completion", "created": 1796000000, "model": "base",
            "choices": [{"index": 0, "text": " there was", "finish_reason": "length"}], "usage": _USAGE,
        },
        errors=GENERATING,
    ),
    ("post", "/v1/responses"): Route(
        "OpenAI's responses. Nothing is stored: send the whole conversation as `input`.",
        body={"input": "What is a gearbox?", "max_output_tokens": 64},
        answer={"id": "resp-1", "object": "response", "status": "completed", "model": "base", "output": []},
        errors=GENERATING,
    ),
    ("post", "/v1/messages"): Route(
        "Anthropic's messages, with tools, thinking and streams. Errors have Anthropic's form; the key "
        "may come as `x-api-key`.",
        body={
            "model": "base", "max_tokens": 64,
            "messages": [{"role": "user", "content": "What is a gearbox?"}],
        },
        answer={
            "id": "msg_1", "type": "message", "role": "assistant", "model": "base",
            "content": [{"type": "text", "text": "A gearbox …"}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 13, "output_tokens": 7},
        },
        errors=GENERATING,
    ),
    ("post", "/v1/messages/count_tokens"): Route(
        "The number of tokens that `/v1/messages` would show to the model.",
        body={"model": "base", "messages": [{"role": "user", "content": "What is a gearbox?"}]},
        answer={"input_tokens": 13},
        errors=TOOLS,
    ),
    ("get", "/v1/models"): Route(
        "The base model and the adapters beside it: what `model` may be.",
        answer={"object": "list", "data": [_MODEL]}, errors=READING,
    ),
    ("get", "/v1/models/{name}"): Route(
        "One of them.", answer=_MODEL, errors=(401, 404, 503), path="/v1/models/base"
    ),
    ("post", "/tokenize"): Route(
        "The token ids of a `prompt`, or of `messages` as the chat template makes them.",
        body={"prompt": "What is a gearbox?"},
        answer={"count": 5, "max_model_len": 4096, "tokens": [1, 2, 3, 4, 5], "token_strs": None},
        errors=TOOLS,
    ),
    ("post", "/detokenize"): Route(
        "The text of token ids.", body={"tokens": [72, 105]}, answer={"prompt": "Hi"}, errors=TOOLS
    ),
    ("post", "/v1/load_lora_adapter"): Route(
        "Needs `--adapter-root` and an administrator's key. The adapter answers requests for that `model`.",
        body={"lora_name": "support", "lora_path": "support"},
        answer={"message": "adapter 'support' is served"}, errors=ADMIN, refused=400,
    ),
    ("post", "/v1/unload_lora_adapter"): Route(
        "Needs the same. Requests in flight end well.",
        body={"lora_name": "support"},
        answer={"message": "adapter 'support' is served no more"}, errors=ADMIN, refused=404,
    ),
    ("get", "/livez"): Route(
        "For a liveness probe. 503 once requests run and no token comes.", answer=_ALIVE, errors=(503,)
    ),
    ("get", "/readyz"): Route(
        "For a readiness probe. 503 while loading and shutting down.", answer=_ALIVE, errors=(503,)
    ),
    ("get", "/health"): Route("`/readyz`, by another name.", answer=_ALIVE, errors=(503,)),
    ("get", "/healthz"): Route("`/readyz`, by another name.", answer=_ALIVE, errors=(503,)),
    ("get", "/metrics"): Route(
        "Figures in Prometheus' format, under vLLM's names.", answer="vllm:num_requests_running …"
    ),
    ("get", "/version"): Route("The server's version.", answer={"version": "1.0"}, errors=(401,)),
    ("get", "/docs"): Route("A page of all of this, readable without a key.", answer="<!doctype html> …"),
    ("get", "/"): Route(
        "A page to chat with the model, for browsers.", answer={"message": "Server is running"}, errors=(401,)
    ),
}  # fmt: skip
"""By method and path."""


def described(api: dict[str, Any]) -> dict[str, Any]:
    """Return the description of an app with what `ROUTES` says put in."""
    api["info"]["description"] = (
        "Every POST body is JSON; docs/http.md says what becomes of other fields. Where the server "
        "has a key, send it as `Authorization: Bearer KEY`."
    )
    api["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            route = ROUTES.get((method, path))
            if route is not None:
                _describe(operation, route, method, path)
    return api


def _describe(operation: dict[str, Any], route: Route, method: str, path: str) -> None:
    operation["description"] = route.text
    operation["security"] = [] if path in KEYLESS_PATHS else [{"key": []}]
    operation["x-codeSamples"] = samples(method, route.path or path, route.body)
    kind = "application/json" if isinstance(route.answer, dict) else "text/plain"
    if path == "/docs":
        kind = "text/html"
    operation["responses"]["200"]["content"].setdefault(kind, {})["example"] = route.answer
    if route.body is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = route.body
    error = operation["responses"]["4XX"]["content"]
    for status in route.errors:
        operation["responses"][str(status)] = {"description": ERRORS[status], "content": error}


def samples(method: str, path: str, body: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Return the same request for a shell, Python and JavaScript; the key is in API_KEY."""
    url, sent = BASE + path, json.dumps(body) if body is not None else ""
    curl = f'curl {url} -H "Authorization: Bearer $API_KEY"'
    curl += f" \\\n  -H 'Content-Type: application/json' -d '{sent}'" if sent else ""
    python = [
        "from os import environ",
        "",
        "import httpx",
        "",
        'headers = {"Authorization": f"Bearer {environ[\'API_KEY\']}"}',
        f'answer = httpx.{method}("{url}", headers=headers'
        + (f", json={_literal(body)}, timeout=600)" if body is not None else ")"),
        "print(answer.text)",
    ]
    javascript = [
        f'const answer = await fetch("{url}", {{',
        *([f'  method: "{method.upper()}",'] if body is not None else []),
        "  headers: {",
        "    Authorization: `Bearer ${process.env.API_KEY}`,",
        *(['    "Content-Type": "application/json",'] if body is not None else []),
        "  },",
        *([f"  body: JSON.stringify({sent}),"] if sent else []),
        "});",
        "console.log(await answer.text());",
    ]
    return [
        {"lang": "Shell", "label": "curl", "source": curl},
        {"lang": "Python", "label": "Python", "source": "\n".join(python)},
        {"lang": "JavaScript", "label": "JavaScript", "source": "\n".join(javascript)},
    ]


def _literal(body: Mapping[str, Any] | None) -> str:
    """Return a body as Python writes it, with JSON's quotes."""
    text = json.dumps(body)
    return text.replace(": true", ": True").replace(": false", ": False").replace(": null", ": None")
