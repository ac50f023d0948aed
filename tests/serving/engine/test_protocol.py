"""What every engine promises: greedy equals generate, adapters by name, failures answered, slots freed."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from runtime.errors import ConfigError, OverloadedError, UnavailableError, UnknownModelError
from runtime.serving.engine.backends.simple import SimpleEngine
from runtime.serving.engine.backends.vllm import VllmEngine
from runtime.serving.engine.backends.vllm_process import VllmProcess
from runtime.serving.engine.engine import BatchingEngine, EngineLimits
from runtime.serving.engine.protocol import Engine
from tests.serving.conftest import until
from tests.serving.engine.calls import collect, generate, load, make_request, run


@pytest.fixture(params=["simple", "batching", "vllm"])
def engine(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> Iterator[Engine]:
    """An engine that answers one request at a time."""
    if request.param == "vllm":
        yield from vllm_engine(request.getfixturevalue("vllm_server"))
        return
    model = load(tiny_llama_dir)
    made: Engine = (
        SimpleEngine(model, context_tokens=256, max_waiting=2)
        if request.param == "simple"
        else BatchingEngine(model, EngineLimits(max_sequences=1, context_tokens=256, max_waiting=2))
    )
    yield made
    made.close()


def vllm_engine(server: VllmProcess) -> Iterator[VllmEngine]:
    """An engine over a vLLM that outlives it, and that has no adapters before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "close", lambda: None)
        made = VllmEngine(server, name="base", context_tokens=256, max_sequences=1, max_waiting=2)
        yield made
        if made.stats().alive:
            for name in made.stats().adapters:
                made.remove_adapter(name)
        made.close()


def test_greedy_equals_generate(engine: Engine, tiny_llama_dir: Path) -> None:
    ((ids, reason),) = run(engine, make_request())
    assert (ids, reason) == (generate(load(tiny_llama_dir)), "length")


def test_a_repetition_penalty_equals_that_of_generate(engine: Engine, tiny_llama_dir: Path) -> None:
    ((ids, _),) = run(engine, make_request(repetition_penalty=1.3))
    assert ids == generate(load(tiny_llama_dir), repetition_penalty=1.3)


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    varied = {"temperature": 1.5, "seed": 7}
    ((ids, _),) = run(engine, make_request(**varied))
    stop = next(token for token in ids[2:] if token not in ids[:2])
    ((stopped, reason),) = run(engine, make_request(**varied, stop_ids=frozenset({stop})))
    assert (stopped, reason) == (ids[: ids.index(stop)], "stop")


def test_min_new_tokens_keeps_stop_ids_away(engine: Engine) -> None:
    ((ids, _),) = run(engine, make_request())
    ((kept, _),) = run(engine, make_request(stop_ids=frozenset({ids[0]}), min_new_tokens=3))
    assert len(kept) >= 3
    assert ids[0] not in kept[:3]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: Engine) -> None:
    once, again, other = run(
        engine,
        make_request(temperature=1.5, seed=7, id="a"),
        make_request(temperature=1.5, seed=7, id="b"),
        make_request(temperature=1.5, seed=8, id="c"),
    )
    assert once == again
    assert once != other


def test_the_context_is_never_exceeded(engine: Engine) -> None:
    ((ids, reason),) = run(engine, make_request(tuple(range(3, 253)), max_new_tokens=100))
    assert (len(ids), reason) == (256 - 250, "length")


def test_a_full_queue_refuses_at_once(engine: Engine) -> None:
    async def flood() -> None:
        tokens = [engine.submit(make_request(id=str(number), max_new_tokens=200)) for number in range(3)]
        with pytest.raises(OverloadedError, match="2 requests are waiting"):
            tokens.extend(engine.submit(make_request(id=str(number))) for number in range(3, 5))
        for number in range(5):
            engine.cancel(str(number))
        assert {(await collect(each))[1] for each in tokens} == {"cancelled"}

    asyncio.run(flood())


def test_closing_the_iterator_ends_the_request(engine: Engine) -> None:
    async def leave() -> None:
        tokens = engine.submit(make_request(max_new_tokens=240))
        await anext(tokens)
        await tokens.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(2):
            while engine.stats().running:
                await asyncio.sleep(0.005)

    asyncio.run(leave())


def test_an_adapter_answers_as_plain_peft_does(
    engine: Engine, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    base = run(engine, make_request())
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    requests = [
        make_request(adapter=name, id=str(n)) for n, name in enumerate([*adapter_dirs, None, *adapter_dirs])
    ]
    answers = [ids for ids, _ in run(engine, *requests[:3])] + [ids for ids, _ in run(engine, *requests[3:])]
    expected = [
        generate(PeftModel.from_pretrained(load(tiny_llama_dir), str(folder)))
        for folder in adapter_dirs.values()
    ]
    assert answers == [*expected, base[0][0], *expected]
    assert engine.stats().adapters == tuple(adapter_dirs)


def test_strength_scales_the_update(
    engine: Engine, tiny_llama_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    engine.add_adapter("none", adapter_dirs["second"], strength=0.0)
    engine.add_adapter("half", adapter_dirs["second"], strength=0.5)
    model = PeftModel.from_pretrained(load(tiny_llama_dir), str(adapter_dirs["second"]))
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 0.5
    answers = [
        ids
        for ids, _ in run(
            engine, make_request(adapter="none"), make_request(adapter="half", id="2"), make_request(id="3")
        )
    ]
    assert answers[0] == answers[2]
    assert answers[1] == generate(model)


def test_an_unknown_or_removed_adapter_is_refused(engine: Engine, adapter_dirs: dict[str, Path]) -> None:
    base = run(engine, make_request())
    engine.add_adapter("x", adapter_dirs["second"])
    engine.remove_adapter("x")
    assert run(engine, make_request()) == base
    with pytest.raises(UnknownModelError, match="adapter 'x' is not loaded"):
        run(engine, make_request(adapter="x"))


def test_fault_50_removal_waits_for_the_answer_in_flight(
    engine: Engine, adapter_dirs: dict[str, Path]
) -> None:
    engine.add_adapter("x", adapter_dirs["second"])
    expected = run(engine, make_request(adapter="x", max_new_tokens=200))

    async def remove_meanwhile() -> tuple[list[int], str | None]:
        tokens = engine.submit(make_request(adapter="x", max_new_tokens=200))
        removal = threading.Thread(target=engine.remove_adapter, args=("x",))
        removal.start()
        answer = await collect(tokens)
        await asyncio.to_thread(removal.join)
        return answer

    assert asyncio.run(remove_meanwhile()) == expected[0]
    assert engine.stats().adapters == ()


def test_an_adapter_of_another_shape_is_refused_and_the_base_still_served(
    engine: Engine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = run(engine, make_request())
    for file in adapter_dirs["second"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(str(tmp_path / "adapter_model.safetensors"))
    save_file(
        {
            name: torch.nn.functional.pad(value, (0, 1) if "lora_A" in name else (0, 0, 0, 1))
            for name, value in weights.items()
        },
        str(tmp_path / "adapter_model.safetensors"),
    )
    with pytest.raises(ConfigError, match="adapter bad: does not fit this model"):
        engine.add_adapter("bad", tmp_path)
    assert engine.stats().adapters == ()
    assert run(engine, make_request()) == base
    engine.add_adapter("good", adapter_dirs["second"])
    assert run(engine, make_request(adapter="good")) != base


def test_fault_48_a_failure_answers_its_request_and_the_next_is_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("kernel launch failed at 0x7f")

    with monkeypatch.context() as patch:
        if isinstance(engine, SimpleEngine):
            patch.setattr(engine, "_forward", broken)
        elif isinstance(engine, VllmEngine):
            patch.setattr(engine, "_stream", broken)
        else:
            patch.setattr(engine._runner, "run", broken)
        with pytest.raises(UnavailableError, match="failed on this request") as caught:
            run(engine, make_request())
        assert "0x7f" not in str(caught.value)
    assert run(engine, make_request())[0][1] == "length"


def test_abort_fails_what_is_in_flight(engine: Engine) -> None:
    async def abort_meanwhile() -> None:
        tokens = engine.submit(make_request(max_new_tokens=240))
        await anext(tokens)
        engine.abort()
        with pytest.raises(UnavailableError):
            await collect(tokens)

    asyncio.run(abort_meanwhile())
    with pytest.raises(UnavailableError):
        run(engine, make_request())
    until(lambda: not engine.stats().alive)


def test_close_ends_what_is_in_flight_as_cancelled(engine: Engine) -> None:
    async def close_meanwhile() -> list[tuple[list[int], str | None]]:
        tokens = [engine.submit(make_request(id=str(n), max_new_tokens=240)) for n in range(2)]
        await anext(tokens[0])
        engine.close()
        return await asyncio.gather(*(collect(each) for each in tokens))

    assert {reason for _, reason in asyncio.run(close_meanwhile())} == {"cancelled"}
    with pytest.raises(UnavailableError):
        run(engine, make_request())
