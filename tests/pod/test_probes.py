"""The exec probes of controllers' vLLM pods; test_inference.py runs them against a server."""

from runtime.pod import probes


def test_benchmark_counts_what_streams_took() -> None:
    streams = [probes.Stream(0.1, 0.4, 4, 10), probes.Stream(0.3, 0.3, 1, 5)]
    assert probes.summary(streams, 2.0) == {
        "vllm_total_tpm": 600.0,
        "ttft_avg_ms": 200.0,
        "tpot_avg_ms": 100.0,
    }
