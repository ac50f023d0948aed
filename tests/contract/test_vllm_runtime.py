"""The pod of the controller's default runtime, launched and probed as it does, with one and two processes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.contract.kubelet import Node, Pod, documents
from tests.pod.test_benchmark import controller_reads
from tests.serving.engine.calls import save_adapter

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]  # the image is built first

HERE = Path(__file__).parent
SERVER, MODEL, ADAPTER = "workspace-phi-3", "phi-3-mini-128k-instruct", "my-adapter.v1"
ONE = "--tensor-parallel-size=1"
TWO = "--tensor-parallel-size=2"
COPIES = "--data-parallel-size=2 --tensor-parallel-size=1"


def pod_of(parallelism: str, node: Node, image: str, model: Path, folder: Path) -> Pod:
    node.images["registry.example/kaito-base:0.5.0"] = image
    save_adapter(model, folder, rank=4, targets=["q_proj", "v_proj"])
    for path in (*model.iterdir(), *folder.iterdir()):
        path.chmod(0o644)  # weights are saved for their owner alone
    text = (HERE / "pods/v0.12-vllm.yaml").read_text()
    words = {"PARALLELISM": parallelism, "WEIGHTS": str(model), "ADAPTER": str(folder)}
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    (document,) = documents(text)
    return Pod(node, document, documents((HERE / "configs.yaml").read_text()))


@pytest.mark.parametrize("parallelism", [ONE, TWO, COPIES])
def test_the_default_runtime_becomes_ready_with_a_result_that_the_controller_parses(
    parallelism: str, node: Node, image: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pod_of(parallelism, node, image, tiny_llama_dir, tmp_path / "adapter") as pod:
        pod.start().ready(SERVER)
        config, result = controller_reads(pod.logs(SERVER))
        assert config is not None
        assert config["input_tokens"] + config["output_tokens"] == 512, "as the mounted config limits it"
        assert result["vllm_total_tpm"] > 0
        base = f"http://{pod.ip}:5000"
        models = [entry["id"] for entry in httpx.get(f"{base}/v1/models").json()["data"]]
        assert models == [MODEL, ADAPTER]
        for model in models:
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            answer = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
        running = f'vllm:num_requests_running{{model_name="{MODEL}"}} 1.0'
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": "hi", "max_tokens": 480, "ignore_eos": True, "stream": True}
            stream = pool.submit(httpx.post, f"{base}/v1/completions", json=body, timeout=60)
            while running not in httpx.get(f"{base}/metrics").text:
                assert not stream.done(), f"it ended before it was seen: {stream.result().text[-500:]}"
            assert pod.stop() == {SERVER: 0}, pod.logs(SERVER)
            assert stream.result().text.endswith("data: [DONE]\n\n"), "an answer in flight is completed"
        assert json.loads(stream.result().text.split("\n\n")[-3].removeprefix("data: "))["choices"]
