"""Several processes give the results of one, in its order, with its errors and warnings."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runtime import hardware, models
from runtime.errors import ConfigError, DataError
from runtime.tuning.data import encoding_processes, tokenize
from runtime.tuning.data.bad_rows import BadRows
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import Encoder, TokenizedSplit
from runtime.tuning.identity import rows_digest
from runtime.tuning.settings import Encoding
from tests.tuning.conftest import tiny_job
from tests.tuning.data.template_families import R1

REFUSING = (
    "{% for m in messages %}"
    "{% if 'bad' in m.content %}{{ raise_exception('it is bad') }}{% endif %}"
    "{% endfor %}"
)


def conversation(number: int, question: str = "q", answers: int = 1) -> Example:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"answer {number} " * (number % 5 + 1)},
    ]
    return Example(tuple(messages) * answers, origin=f"a.jsonl: row {number}")


EXAMPLES = [
    conversation(n, "bad" if n in (7, 130, 299) else "q", answers=20 if n % 50 == 0 else 1)
    for n in range(300)
]


@pytest.fixture(autouse=True)
def few_rows_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_processes, "FROM_ROWS", 3)
    monkeypatch.setattr(encoding_processes, "_ROWS_AT_ONCE", 40)
    monkeypatch.setattr(hardware, "usable_cores", lambda: 3)


@pytest.fixture
def encoder(tiny_llama_dir: Path) -> Encoder:
    tokenizer = models.load_tokenizer(tiny_job(tiny_llama_dir, Path(), Path()).model)
    tokenizer.chat_template = REFUSING + R1.replace("<｜end▁of▁sentence｜>", "<|im_end|>")
    return Encoder(tokenizer, Encoding(), max_tokens=64, end_ids=frozenset({tokenizer.eos_token_id}))


def encoded(results: Any, policy: Any = "skip") -> tuple[str, BadRows]:
    """Return the digest of what became of EXAMPLES, and the bad ones."""
    bad_rows = BadRows(policy)
    rows = [row for _, row in tokenize.attempted(EXAMPLES, results, bad_rows) if row is not None]
    return rows_digest(TokenizedSplit(tokenize.collected(rows))), bad_rows


def test_results_errors_and_warnings_are_those_of_one_process(
    encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found, bad = encoded(encoding_processes.results(EXAMPLES, encoder))
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    expected, serially_bad = encoded(tokenize.results(EXAMPLES, encoder))
    assert found == expected
    assert said == [record.getMessage() for record in caplog.records] != []
    assert (bad.first, bad.reasons) == (serially_bad.first, serially_bad.reasons)
    assert bad.skipped == 3
    with pytest.raises(DataError, match=r"a\.jsonl: row 7: .* refuses .*: it is bad"):
        encoded(encoding_processes.results(EXAMPLES, encoder), "fail")


def test_processes_that_are_killed_leave_the_rest_to_one(
    encoder: Encoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1]
    )
    results = encoding_processes.results(EXAMPLES, encoder)
    first = next(results)
    started[0].kill()
    found, _ = encoded(iter([first, *results]))
    assert found == encoded(tokenize.results(EXAMPLES, encoder))[0]
    assert "ended early" in caplog.text


class Deadly(Example):
    """A row that kills the process which a pool gives it to."""

    def __reduce__(self) -> Any:
        return _deadly, (self.origin,)


def _deadly(origin: str) -> Example:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return Deadly(EXAMPLES[0].messages, origin=origin)


def test_a_process_that_is_killed_is_said_in_one_line(
    encoder: Encoder, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*EXAMPLES[:5], _deadly("a.jsonl: row 5")]
    assert len(list(encoding_processes.results(rows, encoder))) == len(rows)
    assert "ended early" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_what_ends_the_job_ends_it_from_another_process_too(encoder: Encoder) -> None:
    encoder.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template in this model"):
        list(encoding_processes.results(EXAMPLES, encoder))


STOPPED = """
import os, sys
from pathlib import Path
from runtime import hardware, models
from runtime.errors import StoppedError
from runtime.tuning.data import encoding_processes
from runtime.tuning.data.example import Example
from runtime.tuning.data.tokenize import Encoder
from runtime.tuning.process.signals import StopSignal
from runtime.tuning.settings import Encoding
from tests.tuning.conftest import tiny_job

hardware.usable_cores = lambda: 2
StopSignal().install()
tokenizer = models.load_tokenizer(tiny_job(Path(sys.argv[1]), Path(), Path()).model)
try:
    rows = [Example((), text="word " * 50)] * 1_000_000
    for _ in encoding_processes.results(rows, Encoder(tokenizer, Encoding(), max_tokens=64)):
        print("encoding", flush=True)
except StoppedError:
    os._exit(143)
"""


def test_a_signal_ends_all_processes_at_once(tiny_llama_dir: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tiny_llama_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout
    assert process.stdout.readline() == b"encoding\n"
    process.terminate()
    process.stdout.close()
    assert process.wait(60) == 143
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_a_tokenizer_of_the_models_own_code_is_used_in_one_process(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[encoding_processes.__name__].subprocess, "Popen", None)
    own = type("Own", (type(encoder.tokenizer),), {"__module__": "transformers_modules.x"})
    encoder.tokenizer.__class__ = own
    assert encoded(encoding_processes.results(EXAMPLES, encoder))[1].skipped == 3
