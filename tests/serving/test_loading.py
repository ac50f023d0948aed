"""A server process with real models: weights, tokenizer, engine and adapters as loading returns them."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime import gpus, oci
from runtime.errors import ConfigError
from runtime.model_source import ModelSource
from runtime.oci.access import DEFAULT
from runtime.serving import loading
from runtime.serving.settings import ServeConfig
from runtime.weights_digest import of_folder
from tests.oci.keypairs import make_pair
from tests.serving.conftest import Process, until

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def adapters(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapter folders for the tiny model: one good, three that must be refused."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    for name in ("good", "half", "pickled", "foreign"):
        tuned.save_pretrained(str(root / name), save_embedding_layers=False)
    weights = root / "half" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (root / "pickled" / "adapter_model.safetensors").rename(root / "pickled" / "adapter_model.bin")
    config_file = root / "foreign" / "adapter_config.json"
    foreign = json.loads(config_file.read_text()) | {"modules_to_save": ["lm_head"]}
    config_file.write_text(json.dumps(foreign))
    return root


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A real server of the tiny model and the four adapters, and a good one in an unsigned image."""
    image = f"oci:{tmp_path_factory.mktemp('image')}/layout:v1"
    oci.push(adapters / "good", oci.parse(image))
    config = {
        "model": {
            "name": "tiny",
            "path": str(tiny_llama_dir),
            "required_keys": [str(make_pair(tmp_path_factory.mktemp("keys")).public)],
        },
        "served_name": "tiny",
        "host": "127.0.0.1",
        "port": 0,
        "api_key": "sesame",
        "adapter_root": str(adapters),
        "adapters": [
            *(
                {"name": name, "reference": str(adapters / name)}
                for name in ("half", "good", "pickled", "foreign")
            ),
            {"name": "unsigned", "reference": image},
        ],
        "limits": {"new_tokens": 16},
    }
    yield from served(config)


def served(config: dict[str, Any]) -> Iterator[Process]:
    """Start `runtime.serving.http.server.run` in a process and wait until it is ready."""
    program = (
        "import json, sys; from runtime import logs; from runtime.serving import settings;"
        "from runtime.serving.http import server;"
        "logs.configure(); server.run(settings.ServeConfig.model_validate(json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, json.dumps(config)]
    site = Process.start(command, environ=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: site.process.poll() is not None or any("Serving " in line for line in site.log), 120)
        assert site.process.poll() is None, site.log
        yield site
        assert site.stop() == 0
    finally:
        site.close()


def client_of(site: Process) -> openai.OpenAI:
    """Return the official client with the server's key."""
    return openai.OpenAI(base_url=site.url + "/v1", api_key="sesame", max_retries=0)


def test_models_say_the_digests_of_their_weights(tiny: Process, tiny_llama_dir: Path, adapters: Path) -> None:
    def digests() -> list[str | None]:
        return [
            (model.model_extra or {}).get("weights_sha256") for model in client_of(tiny).models.list().data
        ]

    until(lambda: digests()[0] is not None)
    assert digests()[:2] == [of_folder(tiny_llama_dir), of_folder(adapters / "good")]
    assert f"weights of tiny: sha256 {of_folder(tiny_llama_dir)}" in "".join(tiny.log)


HI: Any = [{"role": "user", "content": "hello"}]


def test_bad_adapters_are_refused_by_name_and_the_rest_is_served(tiny: Process) -> None:
    """Fault 49."""
    assert [model.id for model in client_of(tiny).models.list().data] == ["tiny", "good"]
    text = "".join(tiny.log)
    assert "Adapter added: good" in text
    for name in ("half", "pickled", "foreign", "unsigned"):
        assert f"Adapter refused: {name}: " in text
    assert "is not signed; expected a signature by" in text
    ready = tiny.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "Healthy",
        "refused_adapters": ["half", "pickled", "foreign", "unsigned"],
    }
    metrics = text_string_to_metric_families(tiny.get("/metrics").text)
    (failures,) = [family for family in metrics if family.name == "runtime:adapter_failures"]
    assert [(each.labels["reason"], each.value) for each in failures.samples if "total" in each.name] == [
        ("refused", 4.0)
    ]


def test_greedy_answer_is_repeatable_and_differs_by_adapter(tiny: Process) -> None:
    create = client_of(tiny).chat.completions.create
    texts = [
        create(model=model, messages=HI, temperature=0, max_tokens=12).choices[0].message.content
        for model in ("tiny", "tiny", "good")
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_streamed_and_complete_answers_are_equal(tiny: Process) -> None:
    create = client_of(tiny).chat.completions.create
    complete = create(model="tiny", messages=HI, temperature=0, max_tokens=24)
    stream = create(model="tiny", messages=HI, temperature=0, max_tokens=24, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == complete.choices[0].message.content


def test_seed_repeats_sampled_text(tiny: Process) -> None:
    """Fault 52, seed."""
    create = client_of(tiny).chat.completions.create
    texts = [
        create(model="tiny", messages=HI, temperature=1.0, seed=seed, max_tokens=16)
        .choices[0]
        .message.content
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_chat_carries_out_what_generate_does_with_the_same_parameters(
    tiny: Process, tiny_llama_dir: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama_dir)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    ids = torch.tensor([tokenizer.encode("Hello there")])

    def answer(**options: Any) -> list[int]:
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return list(made[0, ids.shape[1] :].tolist())

    plain = answer()
    cases: list[dict[str, Any]] = [
        {},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [plain[:1], plain[1:3]]},
        {"suppress_tokens": plain[:2]},
        {"begin_suppress_tokens": plain[:1]},
        {"eos_token_id": plain[5]},
        {"eos_token_id": [plain[5], plain[3]], "min_length": ids.shape[1] + 8},
        {"forced_eos_token_id": 9},
        {
            "repetition_penalty": 1.2,
            "num_beams": 1,
            "top_k": 50,
            "use_cache": True,
            "renormalize_logits": True,
        },
    ]
    post = httpx.Client(base_url=tiny.url, headers={"Authorization": "Bearer sesame"}, timeout=60).post
    for case in cases:
        kwargs = {"max_new_tokens": 24, "do_sample": False, **case}
        reply = post("/chat", json={"prompt": "Hello there", "raw": True, "generate_kwargs": kwargs})
        assert reply.status_code == 200, reply.text
        ends = case.get("eos_token_id", [])
        expected = answer(**case)
        if expected[-1] in (ends if isinstance(ends, list) else [ends]):
            expected.pop()
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        text = tokenizer.decode([*ids[0].tolist(), *expected], skip_special_tokens=True)[len(before) :]
        assert reply.json()["Result"] == text, case


def test_logprobs_are_probabilities(tiny: Process) -> None:
    answer = client_of(tiny).chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    scored = answer.choices[0].logprobs
    assert scored is not None
    for entry in scored.content or []:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_adapter_loads_and_unloads_while_others_are_answered(tiny: Process) -> None:
    """Fault 50: answers in flight stay what they were."""
    post = httpx.Client(base_url=tiny.url, headers={"Authorization": "Bearer sesame"}, timeout=60).post
    create = partial(
        client_of(tiny).chat.completions.create,
        messages=HI,
        temperature=0,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )

    def rest(chunks: Any) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    expected = rest(create(model="good"))
    loaded = post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "good"})
    assert loaded.status_code == 200, loaded.text
    with create(model="again") as answer, create(model="tiny") as other:
        begun = rest([next(answer), next(answer)])
        assert post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
        assert begun + rest(answer) == expected
        assert rest(other) == rest(create(model="tiny")) != expected
    with pytest.raises(openai.NotFoundError):
        create(model="again")
    refused = post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "half"})
    assert refused.status_code == 400
    assert "half" in refused.json()["error"]["message"]


def test_client_that_disconnects_frees_the_real_engine(tiny: Process) -> None:
    """Fault 40, with a real engine."""
    before = generated(tiny)
    headers = {"Authorization": "Bearer sesame"}
    body = {"prompt": "hello", "stream": True, "max_new_tokens": 1900, "ignore_eos": True}
    with httpx.stream("POST", tiny.url + "/chat", json=body, headers=headers, timeout=60) as stream:
        chunks = stream.iter_text()
        next(chunks)
        assert tiny.running() == 1
    until(lambda: tiny.running() == 0)
    assert generated(tiny) < before + 1900


def generated(site: Process) -> float:
    """Return the tokens generated so far, as /metrics says."""
    text = site.get("/metrics").text
    return float(re.findall(r"^vllm:generation_tokens_total\S* (\S+)", text, re.MULTILINE)[0])


def test_burst_on_the_real_engine_has_no_5xx(tiny: Process) -> None:
    """Fault 41, briefly, with a real engine."""
    headers = {"Authorization": "Bearer sesame"}
    with (
        httpx.Client(base_url=tiny.url, headers=headers, timeout=120) as client,
        ThreadPoolExecutor(40) as pool,
    ):
        body = {"prompt": "hello", "max_new_tokens": 4}
        codes = list(pool.map(lambda _: client.post("/chat", json=body).status_code, range(160)))
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 64


@pytest.fixture(scope="module")
def demo(demo_model_dir: Path) -> Iterator[Process]:
    """A real server of the demo model."""
    config = {
        "model": {"name": "smollm2-135m-instruct", "path": str(demo_model_dir)},
        "served_name": "smollm2-135m-instruct",
        "host": "127.0.0.1",
        "port": 0,
    }
    yield from served(config)


def test_demo_model_answers_a_question(demo: Process) -> None:
    started = time.monotonic()
    ran = subprocess.run(
        ["curl", "-sS", demo.url + "/chat", "-d", '{"prompt": "What is the capital of France?"}'],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answer = json.loads(ran.stdout)
    assert "Paris" in answer["Result"]
    assert answer["finish_reason"] == "stop"
    assert "<|" not in answer["Result"]
    logging.getLogger(__name__).info("%s tokens, %.1f s", answer["usage"], time.monotonic() - started)


def test_demo_model_stops_at_a_string(demo: Process) -> None:
    answer = client_of(demo).chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=40,
        stop=["Paris"],
    )
    text = answer.choices[0].message.content or ""
    assert "Paris" not in text
    assert text.startswith("The capital")
    assert answer.choices[0].finish_reason == "stop"


def test_a_model_that_overflows_float16_is_refused_before_its_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    monkeypatch.setattr(loading.hardware, "detect", lambda: gpus.of_kind("T4-16GB"))
    for engine in ("own", "vllm"):
        model = ModelSource(name="m", path=tmp_path)
        config = ServeConfig.model_validate({"model": model, "served_name": "m", "engine": engine})
        with pytest.raises(ConfigError, match=r"gemma3_text models exceed 65504.*T4-16GB.*float32"):
            loading.load(config, DEFAULT)
