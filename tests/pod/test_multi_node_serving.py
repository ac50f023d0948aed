"""multi-node-serving.sh, which controllers call before a model on several nodes."""

import subprocess

from tests.pod.processes import FILES


def test_multi_node_serving_is_refused_with_what_to_do() -> None:
    done = subprocess.run(
        [FILES / "vllm/multi-node-serving.sh", "leader"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "resource.count to 1" in done.stderr
