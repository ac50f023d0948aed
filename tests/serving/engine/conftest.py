"""A model and adapters that change every answer, made once; a vLLM over that model, where there is one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import hardware
from runtime.serving.engine.backends import vllm
from runtime.serving.engine.backends.vllm_process import VllmProcess
from runtime.serving.engine.prompt_lookup import PromptLookup
from runtime.serving.settings import ServeConfig
from tests.conftest import write_tiny_llama
from tests.serving.engine.calls import Oracle, save_adapter
from tests.serving.engine.capped import ProcessCaps


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the least that vLLM's attention takes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_tiny_llama(folder, head_dim=32)
    return folder


@pytest.fixture(scope="session")
def vllm_server(tiny_llama_dir: Path) -> Iterator[VllmProcess]:
    """A real vLLM, which takes minutes to start; RUNTIME_TEST_VLLM is the path of its command."""
    program = os.environ.get("RUNTIME_TEST_VLLM")
    if not program:
        pytest.skip("RUNTIME_TEST_VLLM=DIRECTORY/bin/vllm asks a real vLLM (it takes minutes to start)")
    flags = {"enforce-eager": True, "max-loras": 3}
    config = ServeConfig.model_validate(
        {
            "model": {"name": "tiny"},
            "served_name": "base",
            "adapter_root": "/",
            "limits": {"context_tokens": 256},
            "vllm": {"program": program, "flags": flags},
        }
    )
    server = VllmProcess(program, [str(tiny_llama_dir), *vllm.flags(config, hardware.detect())])
    server.wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def adapter_dirs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different rank and targets, with weights that change every answer."""
    made = {}
    for seed, (name, rank, targets) in enumerate(
        [("my.first-one", 4, ["q_proj", "v_proj"]), ("second", 8, ["gate_proj", "down_proj", "o_proj"])]
    ):
        made[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(tiny_llama_dir, made[name], rank=rank, targets=targets, seed=seed)
    return made


@pytest.fixture
def process_caps(tmp_path_factory: pytest.TempPathFactory) -> ProcessCaps:
    """Makes the processes that it starts run out of memory."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    return ProcessCaps(tmp_path_factory.mktemp("caps"))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """What all drafts are taken from."""
    made = Oracle()

    def draft(_: PromptLookup, ids: list[int], *, most: int) -> tuple[int, ...]:
        return made.draft(ids, most=most)

    monkeypatch.setattr(PromptLookup, "draft", draft)
    return made
