"""An adapter's author: configuration, header and bytes are anything, and are read as serving reads them."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.adapters.weights import scaled_pairs
from runtime.errors import Failure
from tests.adapters.made import make

pytestmark = pytest.mark.long

EXAMPLES = 2000
FLAT_BYTES = 64 << 20
"""What the process may grow by while it reads, over all examples: the allocator's own."""

KEYS = [
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "peft_type", "task_type",
    "use_rslora",
    "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "bias", "use_dora",
    "init_lora_weights", "base_model_name_or_path", "revision", "trainable_token_indices", "unheard_of",
]  # fmt: skip
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["q_proj", "(a+)+$", "all-linear", "LORA", ".*", "[", "pissa", "\ud800", "x" * 5000])
)
VALUES: Any = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F64", "BOOL", "F8_E4M3", "X"]) | VALUES,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | VALUES,
    },
)


def read(folder: Path) -> str:
    """Return what came of reading the adapter in `folder`; anything but a Failure is raised."""
    try:
        scaled_pairs(folder, name="x")
    except Failure as failure:
        assert "\n" not in str(failure)
        assert len(str(failure)) < 10_000
        return "refused"
    return "read"


def parts(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of safetensors, and what follows it."""
    size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def joined(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def good(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tiny_llama_dir, tmp_path_factory.mktemp("fuzzed") / "x")
    assert read(folder) == "read"
    return folder


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_anything_in_an_adapters_folder_is_read_or_refused_and_takes_no_memory(
    good: Path, tmp_path: Path
) -> None:
    config = json.loads((good / "adapter_config.json").read_text())
    weights = (good / "adapter_model.safetensors").read_bytes()
    header, data = parts(weights)
    tensors = sorted(name for name in header if name != "__metadata__")
    seen: dict[str, int] = {}
    grown = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        changed=CONFIGS,
        tensor=st.sampled_from(tensors),
        entry=st.just({}) | HEADERS,
        flips=st.lists(st.tuples(st.integers(0, len(weights) - 1), st.integers(0, 255)), max_size=4),
        cut=st.just(None) | st.integers(0, len(weights)),
    )
    def fuzz(
        changed: dict[str, Any],
        tensor: str,
        entry: dict[str, Any],
        flips: list[tuple[int, int]],
        cut: int | None,
    ) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
        made = bytearray(joined({**header, tensor: {**header[tensor], **entry}}, data))
        for place, value in flips:
            made[place % len(made)] = value
        (tmp_path / "adapter_model.safetensors").write_bytes(bytes(made[:cut]))
        nonlocal grown
        before = peak()  # drawing counts for nothing: hypothesis builds its table of characters meanwhile
        outcome = read(tmp_path)
        grown += peak() - before
        seen[outcome] = seen.get(outcome, 0) + 1

    fuzz()
    assert min(seen.get("read", 0), seen.get("refused", 0)) > EXAMPLES // 50, seen
    assert grown < FLAT_BYTES, seen
