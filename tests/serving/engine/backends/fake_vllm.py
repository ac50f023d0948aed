#!/usr/bin/env python
"""Speaks vLLM's HTTP on a Unix socket without a model: `fake_vllm.py serve DIR --uds=SOCKET …`.

It writes what it receives to files in DIR. A prompt's first id decides what happens: 1 an answer, 2 one that
never begins, 3 a bad request, 4 a failure before the first token, 5 a failure after it, 6 an abort.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

FOLDER = Path(sys.argv[2])
FLAGS = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[3:])
LORAS: dict[str, str] = {}
STOP = 2
SEPARATORS = "a\u2028b\u2029c\x85d"
"""No ends of lines in an event stream; vLLM writes them as they are."""

app = FastAPI()


def note(name: str, what: Any) -> None:
    (FOLDER / name).write_text(json.dumps(what))


def refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


@app.get("/health")
def health() -> Response:
    return Response()


@app.get("/metrics")
def metrics() -> Response:
    info = 'vllm:cache_config_info{block_size="16",engine="%s",num_gpu_blocks="100"} 1.0\n'
    return Response('vllm:kv_cache_usage_perc{engine="0"} 0.25\n' + info % 0 + info % 1)


@app.get("/v1/models")
def models() -> dict[str, Any]:
    return {
        "data": [{"id": FLAGS["served-model-name"], "max_model_len": int(FLAGS.get("max-model-len", 64))}]
    }


@app.post("/v1/load_lora_adapter")
def load(body: dict[str, str]) -> Response:
    if "bad" in body["lora_name"]:
        return refused(400, "rank 128 is greater than max_lora_rank 64")
    LORAS[body["lora_name"]] = body["lora_path"]
    note("loras.json", LORAS)
    return Response("Success")


@app.post("/v1/unload_lora_adapter")
def unload(body: dict[str, str]) -> Response:
    del LORAS[body["lora_name"]]
    note("loras.json", LORAS)
    return Response("Success")


@app.post("/v1/completions")
async def complete(body: dict[str, Any]) -> Response:
    note("body.json", body)
    kind = body["prompt"][0]
    if kind == 3:
        return refused(400, "this grammar is not one")
    if kind == 4:
        return refused(500, "kernel launch failed at 0x7f")
    return StreamingResponse(events(body, kind), media_type="text/event-stream")


async def events(body: dict[str, Any], kind: int) -> AsyncIterator[str]:
    try:
        if kind == 2:
            await asyncio.sleep(60)
        yield event(choice(body, [10, 11], None))
        if kind == 5:
            yield event({"error": {"message": "kernel launch failed at 0x7f", "code": 500}})
        elif kind == 6:
            yield event(choice(body, [], "abort"))
        else:
            yield event(choice(body, [12, STOP], "stop"))
            yield event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 4}}})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        note("broken_off.json", body["prompt"])
        raise


def choice(body: dict[str, Any], ids: list[int], reason: str | None) -> dict[str, Any]:
    one: dict[str, Any] = {"index": 0, "text": SEPARATORS, "token_ids": ids, "finish_reason": reason}
    if body.get("logprobs") is not None:
        likely = {f"token_id:{n}": -0.5 * n for n in range(1, body["logprobs"] + 1)}
        one["logprobs"] = {
            "token_logprobs": [-3.0 for _ in ids],
            "top_logprobs": [{f"token_id:{token}": -3.0, **likely} for token in ids],
        }
    return {"choices": [one]}


def event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


if __name__ == "__main__":
    note("flags.json", FLAGS)
    note("pid.json", os.getpid())
    if "end" in FLAGS:
        print("loading weights\nValueError: Free memory on device is less than desired\nbye")
        sys.exit(1)
    uvicorn.run(app, uds=FLAGS["uds"], log_level="warning")
