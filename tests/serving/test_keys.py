"""The file of API keys: what it may hold, what is refused and shows no key, and when it is read again."""

import asyncio
import hashlib
import logging
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.serving import keys
from runtime.serving.keys import KeyEntry, KeyFile, KeyRing, read

ONE, TWO = "sk-one-0123456789abcdef", "sk-two-0123456789abcdef"

pytestmark = pytest.mark.anyio


def written(folder: Path, text: str | bytes) -> Path:
    file, new = folder / "keys.yaml", folder / "new"
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    new.chmod(0o600)
    return new.replace(file)  # at once: half of a file is not what is tested


def test_a_key_is_text_or_its_digest_with_limits_beside_it(tmp_path: Path) -> None:
    hashed = hashlib.sha256(TWO.encode()).hexdigest()
    text = f"""
# of the search team
search: {ONE}

ops:
  key: sha256:{hashed}
  requests_per_minute: 60
  tokens_per_minute: 20000
  admin: true
"""
    ring = KeyRing(None, read(written(tmp_path, text)))
    first, second = ring.holder(ONE), ring.holder(TWO)
    assert first is not None
    assert (first.name, first.admin) == ("search", False)
    assert second is not None
    assert (second.name, second.admin) == ("ops", True)
    assert second.budget is not None
    assert second.budget.rates.requests_per_minute == 60
    assert ring.holder(hashed) is ring.holder(f"sha256:{hashed}") is ring.holder("") is None


def test_json_is_read_too(tmp_path: Path) -> None:
    file = written(tmp_path, f'{{"a": {{"key": "{ONE}", "admin": true}}, "b": "{TWO}"}}')
    assert [entry.name for entry in read(file)] == ["a", "b"]


SECRET = "hunter2-hunter2-hunter2"
WRONG = {
    "": "holds no API key",
    "# nothing\n": "holds no API key",
    SECRET: "expected NAME: KEY in each line",
    f"- {SECRET}": "expected NAME: KEY in each line",
    f"a: {SECRET}\n  b: {SECRET}": "line 2: expected NAME: KEY",
    f"a: *{SECRET}": "line 1: expected NAME: KEY",
    f"a: !{SECRET} x": "line 1: expected NAME: KEY",
    f"a: {SECRET}\na: {SECRET}2": "line 2: the name 'a' is written twice",
    f'{{"a": "{SECRET}", "a": "{SECRET}2"}}': "the name 'a' is written twice",
    f"a: {SECRET}\n---\nb: {SECRET}2": "holds 2 documents",
    f"a: {SECRET}\nb: {SECRET}": "'a' and 'b' have the same key",
    f"{SECRET}!: x": "the name of entry 1 is not one",
    f"{SECRET}/{SECRET}: x": "the name of entry 1 is not one",
    "1: x": "the name of entry 1 is not one",
    "a: short": "a: the key has 5 characters, expected 16 or more",
    "a:": "a: the key is no text",
    "a: 12345678901234567890": "a: the key is no text; write it in quotes",
    "a: [x]": "a: the key is no text",
    f"a: {{keys: {SECRET}}}": "a: 'key' is missing",
    f"a: {SECRET} {SECRET}": "a: the key has more than 512 characters, or others than printable ASCII",
    f"a: {SECRET}ü": "a: the key has more than 512 characters, or others",
    "a: " + "x" * 513: "a: the key has more than 512 characters",
    "a: sha256:abc": "a: the key begins with sha256: and 64 hex digits do not follow",
    f"a: sha256:{hashlib.sha256(b'').hexdigest()}": "a: the digest is that of no text",
    f"a: {{key: {SECRET}, admin: 5}}": "a: 'admin' is 5",
    f"a: {{key: {SECRET}, requests_per_minute: 0}}": "a: 'requests_per_minute' is 0",
    f"a: {{key: {SECRET}, tokens_per_minute: x}}": "a: 'tokens_per_minute' is 'x', expected a whole number",
    f"a: {{key: {SECRET}, rpm: 5}}": "a: unknown key 'rpm'; known: admin, requests_per_minute",
    f"default: {SECRET}": "'default' is the name of the key from the environment",
    "a: the-environments-key": "'default' and 'a' have the same key",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_in_a_line_without_a_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(written(tmp_path, text), single="the-environments-key")
    said = str(refused.value)
    assert WRONG[text] in said
    assert said.startswith(str(tmp_path / "keys.yaml"))
    assert "\n" not in said
    assert "hunter2" not in said


def test_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="not UTF-8"):
        read(written(tmp_path, b"a: \xff"))
    monkeypatch.setattr(keys, "FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="has 26 bytes, expected a file of API keys of at most 10"):
        read(written(tmp_path, f"a: {ONE}"))


def test_no_more_keys_than_metrics_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MOST_KEYS", 1)
    with pytest.raises(ConfigError, match="holds 2 API keys, expected at most 1"):
        read(written(tmp_path, f"a: {ONE}\nb: {TWO}"))


def test_a_ring_holds_no_key_as_text() -> None:
    ring = KeyRing(ONE, (KeyEntry("a", keys.digest(TWO), keys.KeyLimits()),))
    assert ring.holder(ONE)
    assert ring.holder(TWO)
    held = repr([*ring._holders, *ring._holders.values(), vars(ring)])
    assert ONE not in held
    assert TWO not in held
    assert keys.digest(TWO) not in ring._holders


def test_a_key_alone_has_no_name_and_beside_a_file_it_is_the_default() -> None:
    alone = KeyRing(ONE).holder(ONE)
    assert alone is not None
    assert (alone.name, alone.admin, alone.budget) == ("", True, None)
    beside = KeyRing(ONE, ()).holder(ONE)
    assert beside is not None
    assert (beside.name, beside.admin) == ("default", True)


def test_a_file_that_everybody_can_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, f"a: {ONE}")
    KeyFile(file)
    assert not caplog.records
    file.chmod(0o644)
    KeyFile(file)
    assert "everybody on this machine can read it (mode 0644)" in caplog.text


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(60):
        while text not in caplog.text:
            await asyncio.sleep(0.005)


async def test_a_file_is_read_again_when_asked_and_when_it_was_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, key in ((first, ONE), (second, TWO)):
        folder.mkdir()
        written(folder, f"a: {key}")
    data = tmp_path / "..data"  # as a Secret is mounted: a link to a folder, which is replaced
    data.symlink_to(first)
    held = KeyFile(data / "keys.yaml")
    used = held.ring.figures()["a"]
    watching = asyncio.create_task(held.watch())
    held.asked.set()
    await until_logged(caplog, "API keys read again: 1 in")
    assert held.ring.holder(ONE)
    caplog.clear()
    monkeypatch.setattr(keys, "POLL_S", 0.01)
    held.asked.set()  # the wait that has begun has the old time
    await until_logged(caplog, "API keys read again")
    caplog.clear()
    swapped = tmp_path / "..new"
    swapped.symlink_to(second)
    swapped.replace(data)
    await until_logged(caplog, "API keys read again")
    assert held.ring.holder(ONE) is None
    assert held.ring.holder(TWO)
    assert held.ring.figures()["a"] is used
    watching.cancel()


async def test_a_wrong_file_changes_nothing_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(keys, "POLL_S", 0.005)
    file = written(tmp_path, f"a: {ONE}\nb: {TWO}")
    held = KeyFile(file)
    watching = asyncio.create_task(held.watch())
    written(tmp_path, "a: hunter2")
    await until_logged(caplog, "API keys stay as they were")
    assert held.ring.holder(ONE)
    written(tmp_path, f"b: {TWO}\nc: {ONE}")
    await until_logged(caplog, "added c; removed a")
    holder = held.ring.holder(ONE)
    assert holder is not None
    assert holder.name == "c"
    assert "hunter2" not in caplog.text
    assert caplog.text.count("stay as they were") == 1
    file.unlink()
    await until_logged(caplog, "no such file")
    assert held.ring.holder(ONE)
    watching.cancel()
