"""Hostile forms end in a process of their own, in time, and cost nobody else anything. Real processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import psutil
import pytest

from runtime.errors import OverloadedError, RequestError
from runtime.serving.engine.protocol import Constraint, Grammar
from runtime.serving.structured_output import limits
from runtime.serving.structured_output.compiler import GrammarCompiler
from runtime.serving.structured_output.lanes import Lanes

pytestmark = pytest.mark.anyio

INTEGER = {"type": "integer"}
END = 2


def bomb(patterns: int, pattern: str = "^.*a{}.*$") -> dict[str, Any]:
    """Return a schema of some hundred bytes that takes time and memory exponential in `patterns`."""
    return {"type": "string", "allOf": [{"pattern": pattern.format(i)} for i in range(patterns)]}


def form(value: Any, kind: Literal["schema", "regex", "grammar"] = "schema") -> Constraint:
    return Constraint(kind, value, "guided")


@pytest.fixture
def compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer, frozenset({END}))
    yield made
    made.close()


async def soon(condition: Callable[[], bool]) -> None:
    """Wait until `condition`."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def written(grammar: Grammar, tokenizer: Any, text: str) -> bytes:
    """Return what may follow `text` where all of it is allowed."""
    mask = grammar.begin()
    allowed = mask.allowed()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        assert allowed[token], f"{tokenizer.decode([token])!r} of {text!r} is not allowed"
        mask.take(token)
        allowed = mask.allowed()
    return allowed


async def test_bomb_is_refused_within_its_time_while_others_compile(compiler: GrammarCompiler) -> None:
    await compiler.compile(form(INTEGER))
    started = time.monotonic()
    exploding = asyncio.create_task(compiler.compile(form(bomb(30))))
    for count in range(5):
        await asyncio.sleep(0.1)
        await compiler.compile(form({"const": count}))
    assert not exploding.done()  # which takes 2 s of a processor
    with pytest.raises(RequestError, match=r"'guided' is too complex: it takes more than 2 s of .*512 MiB"):
        await exploding
    assert time.monotonic() - started < limits.COMPILE_WALL_S + 60


async def test_bombs_leave_the_processor_to_who_answers(tokenizer: Any) -> None:
    """Three of them and a busy process of the server's, on one processor: CPU time beside CPU time."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})  # of this thread, and of what it starts
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    compiler = GrammarCompiler(tokenizer, frozenset({END}))
    try:
        await compiler.compile(form(INTEGER))
        tasks = [asyncio.create_task(compiler.compile(form(bomb(30) | {"title": str(n)}))) for n in range(3)]
        await asyncio.sleep(0.5)
        watched = [psutil.Process(busy.pid)]
        watched += [psutil.Process(each._pid) for each in compiler._live if each._pid]
        before = [sum(each.cpu_times()[:2]) for each in watched]
        await soon(lambda: sum(watched[0].cpu_times()[:2]) > before[0] + 1)
        after = [sum(each.cpu_times()[:2]) for each in watched]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        os.sched_setaffinity(0, every)
        busy.kill()
        busy.wait()
        compiler.close()
    took, *theirs = (end - start for start, end in zip(before, after, strict=True))
    assert 0 < sum(theirs) < 0.6 * took, (took, theirs)  # a third by their niceness; 1 in sessions, 3 without


async def test_refusal_is_remembered(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMPILE_WALL_S", 1.0)
    took = []
    for _ in range(5):
        started = time.monotonic()
        with pytest.raises(RequestError, match="too complex"):
            await compiler.compile(form(bomb(30)))
        took.append(time.monotonic() - started)
    assert min(took[1:]) < 0.9  # none of them where each is compiled


async def test_form_that_explodes_in_the_middle_of_an_answer_ends_that_answer(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    """The first masks are cheap: what is expensive comes behind a text that the answer may not reach."""
    late = " & ".join(f"/q|wwwwwwww.*a{i}.*/" for i in range(12))
    grammar = await compiler.compile(form(f"start: A B\nA: /x{{50}}/\nB: {late}", "grammar"))
    other = await compiler.compile(form(INTEGER))
    with pytest.raises(RequestError, match=r"'guided': too complex: .*step_lexer_fuel"):
        written(grammar, tokenizer, "x" * 50 + "wwwwwwww a1 a2 a3")
    assert written(other, tokenizer, "12")[END]


async def test_process_that_gives_no_mask_is_killed_and_its_form_compiled_anew(
    compiler: GrammarCompiler, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MASK_WALL_S", 0.2)
    grammar = await compiler.compile(form(INTEGER))
    mask = grammar.begin()
    mask.allowed()
    (process,) = compiler._live
    os.kill(process._pid, signal.SIGSTOP)
    mask.take(tokenizer("1", add_special_tokens=False)["input_ids"][0])
    with pytest.raises(RequestError, match=r"'guided': too complex: one token took more than 0.2 s"):
        mask.allowed()
    with pytest.raises(RequestError):
        grammar.begin().allowed()
    assert written(await compiler.compile(form(INTEGER)), tokenizer, "12")[END]


async def test_same_form_at_the_same_time_is_compiled_once(compiler: GrammarCompiler) -> None:
    grammars = await asyncio.gather(*(compiler.compile(form({"const": "same"})) for _ in range(20)))
    assert len({grammar.begin.func.__self__._pid for grammar in grammars}) == 1  # type: ignore[attr-defined]


async def test_client_that_leaves_ends_its_compilation(compiler: GrammarCompiler) -> None:
    await compiler.compile(form(INTEGER))
    leaving = asyncio.create_task(compiler.compile(form(bomb(30))))

    def compiling() -> list[Any]:
        return [each for each in compiler._live if len(each._replies) == 0 and not each._channel.gettimeout()]

    await soon(lambda: len(compiling()) == 1)
    (process,) = compiling()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await soon(lambda: not psutil.pid_exists(process._pid))


async def test_host_that_was_killed_is_started_again(compiler: GrammarCompiler, tokenizer: Any) -> None:
    first = await compiler.compile(form({"const": 1}))
    assert compiler._host._host._process is not None
    compiler._host._host._process.send_signal(signal.SIGKILL)
    compiler._host._host._process.wait()
    for value in (2, 3, 4):
        grammar = await compiler.compile(form({"const": value}))
        assert written(grammar, tokenizer, str(value))[END]
    assert written(first, tokenizer, "1")[END]


async def test_answers_of_one_form_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    grammar = await compiler.compile(form("(ab|cd)+", "regex"))
    left, right = grammar.begin(), grammar.begin()
    a, b, c = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "abc")
    left.take(a)
    right.take(c)
    assert left.allowed()[a]  # the first mask
    assert left.allowed()[b]
    assert right.allowed()[c]
    assert not right.allowed()[b]


async def test_processes_of_forms_are_bounded(compiler: GrammarCompiler) -> None:
    for value in range(40):
        await compiler.compile(form({"const": value}))
    assert len(compiler._live) <= 20


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"enum": ["x" * 100] * 3000}, "characters, at most 262144"),
        ({"enum": list(range(30_000))}, "more than 20000 values"),
        (json.loads('{"items":' * 80 + "true" + "}" * 80), "nested more than 64 deep"),
    ],
)
async def test_size_is_refused_before_anything_is_done(
    compiler: GrammarCompiler, value: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        await compiler.compile(form(value))
    assert compiler._host._host._process is None


@pytest.mark.parametrize("pattern", ["a{1,1000000000}", "a{20000}", "x" * 5000])
async def test_pattern_beyond_its_limits_is_refused(compiler: GrammarCompiler, pattern: str) -> None:
    with pytest.raises(RequestError, match=r"'guided': .*at most \d+"):
        await compiler.compile(form(pattern, "regex"))


async def test_message_names_the_limits_of_the_library(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match=r"too complex: .*step_lexer_fuel 100000"):
        await compiler.compile(form(bomb(8)))


async def test_clients_take_turns() -> None:
    lanes, order = Lanes(2, 10), []

    async def work(client: str, name: str) -> None:
        async with lanes.enter(client):
            order.append(name)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(work("a", f"a{i}") for i in range(4)), work("b", "b0"), work("b", "b1"))
    assert order.index("b1") < order.index("a2")


async def test_queue_is_bounded_and_those_who_leave_free_their_place() -> None:
    lanes = Lanes(1, 2)
    async with lanes.enter("a"):
        waiting = [asyncio.create_task(anext(aiter(_entered(lanes)))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 schemas"):
            await anext(aiter(_entered(lanes)))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(1), lanes.enter("b"):
        pass


async def _entered(lanes: Lanes) -> Any:
    async with lanes.enter("b"):
        yield None


async def test_what_an_ended_answer_did_not_read_is_forgotten(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    """A mask is computed after the last token, too, and nobody asks for it."""
    grammar = await compiler.compile(form("[ab]+", "regex"))
    (letter,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    for _ in range(50):
        mask = grammar.begin()
        mask.allowed()
        mask.take(letter)
        del mask
    assert written(grammar, tokenizer, "ab")[END]
    (process,) = compiler._live
    assert not process._replies
