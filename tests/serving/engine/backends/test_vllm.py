"""The engine over vLLM, against a program that speaks vLLM's HTTP; test_protocol.py can use a real one."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from runtime import hardware
from runtime.errors import ConfigError, RequestError, UnavailableError, UnknownModelError
from runtime.model_source import ModelSource, Quantization
from runtime.serving.engine.backends import vllm
from runtime.serving.engine.protocol import Constraint, Grammar, Sampling, Token
from runtime.serving.settings import AdapterSource, ServeConfig
from tests.serving.conftest import until
from tests.serving.engine.calls import collect, make_request, run

ANSWER, SILENCE, BAD, FAILURE, LATE_FAILURE, ABORT = range(1, 7)
"""First ids of prompts, which decide what fake_vllm.py does."""

Start = Callable[..., vllm.VllmEngine]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A command `vllm` that is the fake."""
    script = tmp_path / "vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_vllm.py")} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model directory, where the fake writes what it received."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def config(program: Path, **more: Any) -> ServeConfig:
    settings = {"vllm": {"program": str(program), **more.pop("vllm", {})}, "limits": {"rows": 2, "queue": 2}}
    return ServeConfig.model_validate(
        {"model": {"name": "m"}, "served_name": "base", "engine": "vllm"} | settings | more
    )


@pytest.fixture
def start(program: Path, folder: Path) -> Iterator[Start]:
    """Return a function that starts an engine; all are closed at the end."""
    started: list[vllm.VllmEngine] = []

    def start_(**more: Any) -> vllm.VllmEngine:
        started.append(vllm.start(config(program, **more), folder, hardware.detect()))
        return started[-1]

    yield start_
    for engine in started:
        engine.close()


def received(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def has_ended(pid: int) -> bool:
    """Whether the process has ended, waited for or not."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_answer_is_vllms_tokens_without_the_stop_id(start: Start) -> None:
    engine = start()
    ((ids, reason),) = run(engine, make_request((ANSWER, 5), stop_ids=frozenset({2})))
    assert (ids, reason) == ([10, 11, 12], "stop")
    assert engine.stats().prompt_tokens == 2
    assert engine.stats().cached_tokens == 4


def test_a_grammar_of_parts_reaches_vllm_as_one(start: Start, folder: Path) -> None:
    llguidance = pytest.importorskip("llguidance")
    asked = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    parts = [{"kind": "schema", "value": asked}, {"kind": "regex", "value": "[a/]+"}]
    constraint = Constraint("answer", {"top": 'start: "f" (part0 | part1)', "parts": parts}, "")
    grammar = Grammar(constraint, begin=lambda: pytest.fail("vLLM compiles it itself"))
    run(start(), make_request((ANSWER, 5), grammar=grammar))
    sent = received(folder, "body")["structured_outputs"]["grammar"]
    assert not llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(sent))


def test_every_sampling_setting_reaches_vllm(start: Start, folder: Path) -> None:
    grammar = Grammar(Constraint("regex", "[ab]+", ""), begin=lambda: pytest.fail("vLLM compiles it itself"))
    request = make_request(
        (ANSWER, 5), max_new_tokens=500, temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, seed=-1,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3, logit_bias={7: 1.5},
        stop_ids=frozenset({9, 2}), min_new_tokens=3, grammar=grammar, top_logprobs=2,
        allowed_token_ids=[4, 9], bad_words=["no"], bad_words_ids=[[8], [6, 7]],
    )  # fmt: skip
    run(start(), request)
    body = received(folder, "body")
    assert body["max_tokens"] == 64 - 2
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "min_tokens")} == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "min_tokens": 3
    }  # fmt: skip
    assert (body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (
        1.1,
        0.2,
        0.3,
    )
    assert body["logit_bias"] == {"7": 1.5}
    assert body["seed"] == 2**63 - 1
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([2, 9], True)
    assert body["structured_outputs"] == {"regex": "[ab]+"}
    assert body["logprobs"] == 2
    assert (body["allowed_token_ids"], body["bad_words"]) == ([4, 9], ["no"])


def test_no_sampling_setting_is_left_out() -> None:
    """A new field of `Sampling` goes into SAME_NAME, or gets a line in `_body` or in `submit`."""
    converted = {
        "max_new_tokens", "min_new_tokens", "logit_bias", "seed", "stop_ids", "grammar", "top_logprobs",
        "allowed_token_ids", "bad_words", "bad_words_ids", "prompt_logprobs",
    }  # fmt: skip
    assert {field.name for field in fields(Sampling)} == converted | {*vllm.SAME_NAME, *vllm.REFUSED}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [4]),
        ("begin_suppress_tokens", [4]),
        ("forced_eos_token_id", [4]),
        ("bad_words_ids", [[4]]),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(start: Start, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is not supported by vLLM") as caught:
        run(start(), make_request(**{name: value}))
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (
            {"prompt_logprobs": True},
            "logprobs",
            "'logprobs' of the prompt ('echo') are not supported",
        ),
        ({"max_new_tokens": 0}, "max_tokens", "'max_tokens' 0 is not supported by vLLM"),
    ],
)
def test_prompts_are_not_scored_by_vllm(start: Start, asked: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        run(start(), make_request(**asked))
    assert caught.value.param == param


def test_log_probabilities_are_the_tokens_own_and_the_likeliest(start: Start) -> None:
    async def first(engine: vllm.VllmEngine) -> Token:
        return await anext(engine.submit(make_request((ANSWER,), top_logprobs=2)))

    token = asyncio.run(first(start()))
    assert (token.id, token.logprob, token.top) == (10, -3.0, ((1, -0.5), (2, -1.0)))
    assert token.start is not None


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        (BAD, RequestError, "this grammar is not one"),
        (FAILURE, UnavailableError, "failed on this request; its log says why"),
        (LATE_FAILURE, UnavailableError, "failed on this request; its log says why"),
        (ABORT, UnavailableError, "aborted this request"),
    ],
)
def test_fault_48_a_failure_answers_its_request_and_the_next_is_served(
    start: Start, prompt: int, kind: type[Exception], message: str
) -> None:
    engine = start()
    with pytest.raises(kind, match=message):
        run(engine, make_request((prompt,)))
    assert run(engine, make_request((ANSWER,)))[0][1] == "stop"


def test_a_cancelled_request_ends_before_its_first_token(start: Start, folder: Path) -> None:
    async def leave(engine: vllm.VllmEngine) -> None:
        tokens = engine.submit(make_request((SILENCE, 9)))
        first = asyncio.ensure_future(anext(tokens))
        while not (folder / "body.json").exists():
            await asyncio.sleep(0.01)
        assert engine.stats().running == 1
        engine.cancel("1")
        assert (await first).finish_reason == "cancelled"

    asyncio.run(leave(start()))
    until((folder / "broken_off.json").exists)
    assert received(folder, "broken_off") == [SILENCE, 9]


def test_vllm_gets_at_most_max_sequences_requests_and_the_rest_wait_here(start: Start) -> None:
    async def ask_four(engine: vllm.VllmEngine) -> None:
        tokens = [engine.submit(make_request((SILENCE,), id=str(n))) for n in range(4)]
        async with asyncio.timeout(5):
            while engine.stats().kv_cache_share != 0.25:
                await asyncio.sleep(0.01)
        assert (engine.stats().running, engine.stats().waiting) == (2, 2)
        assert (engine.stats().max_sequences, engine.stats().cache_tokens) == (2, 2 * 100 * 16)
        assert engine.stats().replicas == 2
        for number in range(4):
            engine.cancel(str(number))
        assert {(await collect(each))[1] for each in tokens} == {"cancelled"}

    asyncio.run(ask_four(start()))


def test_vllm_reads_a_copy_of_an_adapter_that_lasts_until_removal(
    start: Start, folder: Path, adapter_dirs: dict[str, Path]
) -> None:
    engine = start(adapter_root="/")
    engine.add_adapter("x", adapter_dirs["second"])
    kept = Path(received(folder, "loras")["x"])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (kept / file).read_bytes() == (adapter_dirs["second"] / file).read_bytes()
    run(engine, make_request((ANSWER,), adapter="x"))
    assert received(folder, "body")["model"] == "x"
    engine.remove_adapter("x")
    assert received(folder, "loras") == {}
    assert not kept.exists()
    with pytest.raises(UnknownModelError):
        run(engine, make_request((ANSWER,), adapter="x"))


def test_strength_is_in_the_copy_that_vllm_reads(
    start: Start, folder: Path, adapter_dirs: dict[str, Path]
) -> None:
    from safetensors.torch import load_file

    start().add_adapter("half", adapter_dirs["second"], strength=0.5)
    kept = Path(received(folder, "loras")["half"])
    before = load_file(str(adapter_dirs["second"] / "adapter_model.safetensors"))
    after = load_file(str(kept / "adapter_model.safetensors"))
    stated = json.loads((adapter_dirs["second"] / "adapter_config.json").read_text())
    written = json.loads((kept / "adapter_config.json").read_text())
    name = next(name for name in after if "lora_B" in name)
    wanted = before[name] * 0.5 * stated["lora_alpha"] / stated["r"]
    assert (after[name] * written["lora_alpha"] / written["r"]).allclose(wanted)


def test_an_adapter_that_vllm_refuses_is_refused_with_its_reason(
    start: Start, adapter_dirs: dict[str, Path]
) -> None:
    engine = start()
    with pytest.raises(ConfigError, match=r"adapter bad: .*rank 128 is greater than max_lora_rank 64"):
        engine.add_adapter("bad", adapter_dirs["second"])
    assert engine.stats().adapters == ()


def test_the_end_of_vllm_fails_the_requests_in_flight(start: Start, folder: Path) -> None:
    async def kill_meanwhile(engine: vllm.VllmEngine) -> None:
        tokens = engine.submit(make_request((SILENCE,)))
        os.kill(received(folder, "pid"), signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await collect(tokens)

    engine = start()
    assert engine.stats().alive
    asyncio.run(kill_meanwhile(engine))
    until(lambda: not engine.stats().alive)
    with pytest.raises(UnavailableError):
        run(engine, make_request((ANSWER,)))


def test_close_ends_vllm(start: Start, folder: Path) -> None:
    engine = start()
    engine.close()
    assert has_ended(received(folder, "pid"))
    with pytest.raises(UnavailableError):
        run(engine, make_request((ANSWER,)))


def test_vllm_does_not_outlive_a_server_that_is_killed(program: Path, folder: Path) -> None:
    code = (
        "import sys, time; from runtime.serving.engine.backends.vllm_process import VllmProcess\n"
        "VllmProcess(sys.argv[1], [sys.argv[2], '--served-model-name=base']).wait_ready()\n"
        "print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(program), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        server.kill()
    until(lambda: has_ended(received(folder, "pid")))


def test_the_last_error_line_says_why_vllm_did_not_start(start: Start) -> None:
    with pytest.raises(ConfigError, match="ended with status 1 while it loaded: ValueError: Free memory"):
        start(vllm={"flags": {"end": True}})


def test_a_missing_vllm_is_named_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"no program '/nowhere/vllm'.*--set vllm.program="):
        vllm.start(config(Path("/nowhere/vllm")), Path("/"), hardware.detect())


def test_settings_become_vllms_flags_and_the_users_own_win() -> None:
    devices = hardware.detect()
    source = AdapterSource(name="a", reference="/a")
    settings = config(
        Path("vllm"),
        model=ModelSource(name="m", dtype="float32"),
        adapters=[source],
        max_lora_rank=32,
        parallel="tp",
        processes=4,
        replicas=2,
        limits={"rows": 7, "context_tokens": 512},
        quantization=Quantization(bits=4),
        vllm={"flags": {"gpu_memory_utilization": 0.9, "max-loras": 3, "enforce-eager": False}},
    )
    wanted = (
        "--dtype=float32 --max-num-seqs=7 --max-model-len=512 --tensor-parallel-size=4 --enable-lora "
        "--data-parallel-size=2 --max-lora-rank=32 "
        "--max-loras=3 --quantization=bitsandbytes --gpu-memory-utilization=0.9 --no-enforce-eager"
    )
    assert set(wanted.split()) <= set(vllm.flags(settings, devices))
