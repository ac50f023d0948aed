"""Scripts that controllers call beside the servers, as they call them."""

import subprocess
import sys

from tests.pod.processes import ENVIRON, FILES


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, env=ENVIRON)


def test_multi_node_serving_is_refused_with_what_to_do() -> None:
    done = shell(f"{FILES}/vllm/multi-node-serving.sh leader")
    assert done.returncode == 2
    assert "resource.count to 1" in done.stderr


def test_streamed_weights_are_refused_before_the_server_starts() -> None:
    done = shell(f". {FILES}/vllm/export_sas_token_for_streaming.sh; echo started")
    assert done.returncode == 2
    assert "ModelStreaming" in done.stderr
    assert "started" not in done.stdout


def test_the_init_container_for_cudas_compiler_has_nothing_to_do() -> None:
    done = shell(f"{FILES}/cuda-provision.sh /opt/cuda")
    assert done.returncode == 0
    assert "compiles nothing" in done.stdout


def test_architectures_are_listed_one_a_line() -> None:
    done = shell(f"{sys.executable} {FILES}/vllm/list_supported_llm_archs.py")
    assert {"LlamaForCausalLM", "Phi3ForCausalLM"} <= set(done.stdout.splitlines())
