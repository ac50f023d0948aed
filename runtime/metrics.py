"""Prometheus instruments of the server, under the names that autoscalers and dashboards already read.

The names are vLLM's. Each `ServingMetrics` has its own registry: nothing is registered at import.
Knows neither HTTP nor the engine, only its figures. Start at `ServingMetrics`.
"""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BLOCK_TOKENS = 16
"""vLLM's default; the cache here has no blocks, so any size tells its capacity and 16 wastes little of it."""
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


class EngineFigures(Protocol):
    """What the gauges read at each scrape."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_cache_share(self) -> float: ...
    @property
    def adapters(self) -> tuple[str, ...]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def max_sequences(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...
    @property
    def out_of_memory(self) -> Mapping[str, int]: ...
    @property
    def prompt_tokens_limit(self) -> int: ...
    @property
    def replicas(self) -> int: ...


class KeyFigures(Protocol):
    """What a key of several has used."""

    @property
    def used(self) -> Mapping[str, int]: ...
    @property
    def refused(self) -> Mapping[Any, int]: ...


class _Keys(Collector):
    """Reads what each key has used at each scrape: only keys that are valid then."""

    def __init__(self, figures: Callable[[], Mapping[str, KeyFigures]]) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("runtime:key_requests", "Requests of each API key", labels=["key"])
        tokens = CounterMetricFamily(
            "runtime:key_tokens", "Tokens of each API key, in prompts and answers", labels=["key", "kind"]
        )
        refused = CounterMetricFamily(
            "runtime:key_refused", "Requests beyond the limit of their API key", labels=["key", "limit"]
        )
        for name, figures in self._figures().items():
            requests.add_metric([name], figures.used["requests"])
            for kind in ("prompt", "generation"):
                tokens.add_metric([name, kind], figures.used[kind])
            for limit in ("requests", "tokens"):
                refused.add_metric([name, limit], figures.refused[limit])
        yield from (requests, tokens, refused)


class _Gauges(Collector):
    """Reads the engine's figures at each scrape."""

    def __init__(self, model: str, figures: Callable[[], EngineFigures | None]) -> None:
        self._model = model
        self._figures = figures
        self.running: Tally[str] = Tally()
        self.waiting: Tally[str] = Tally()

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        running, waiting, share = (
            (figures.running, figures.waiting, figures.kv_cache_share) if figures else (0, 0, 0.0)
        )
        yield self._gauge("vllm:num_requests_running", "Requests being generated", running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting in the queue", waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Occupied part of the KV cache, 0 to 1", share)
        queried, hits = (figures.prompt_tokens, figures.cached_tokens) if figures else (0, 0)
        yield self._total("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", queried)
        yield self._total("vllm:prefix_cache_hits", "Prompt tokens found in the cache", hits)
        drafted, accepted = (figures.drafted_tokens, figures.accepted_tokens) if figures else (0, 0)
        yield self._total("vllm:spec_decode_num_draft_tokens", "Draft tokens that were run", drafted)
        yield self._total("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted", accepted)
        preemptions = figures.preemptions if figures else 0
        yield self._total(
            "vllm:num_preemptions", "Answers put off for want of KV cache, and computed again", preemptions
        )
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with requests; the value is the time of the scrape",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        resident = figures.adapters if figures else ()
        lora.add_metric([str(len(resident)), _names(self.running), _names(self.waiting)], time.time())
        yield lora
        if figures:
            yield from self._capacity(figures)
            yield from self._memory(figures)

    def _capacity(self, figures: EngineFigures) -> Iterator[Metric]:
        """Yield what clients size their load by: KAITO's benchmark, and routers that weigh prefix caches."""
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache; any number of a sequence's tokens takes whole blocks",
            labels=["model_name", "num_gpu_blocks", "block_size"],
        )
        info.add_metric([self._model, str(figures.cache_tokens // _BLOCK_TOKENS), str(_BLOCK_TOKENS)], 1)
        yield info
        yield self._gauge(
            "kaito_max_concurrent_requests", "Requests generated at the same time", figures.max_sequences
        )
        yield self._gauge(
            "runtime:replicas", "Copies of the model, whose figures are added up here", figures.replicas
        )

    def _memory(self, figures: EngineFigures) -> Iterator[Metric]:
        ran_out = CounterMetricFamily(
            "runtime:out_of_memory",
            "Passes divided and requests or adapters refused because memory ran out",
            labels=["model_name", "reason"],
        )
        for reason, count in figures.out_of_memory.items():
            ran_out.add_metric([self._model, reason], count)
        yield ran_out
        yield self._gauge(
            "runtime:prompt_tokens_limit",
            "Prompt tokens of a pass since memory ran out; 0 is no limit",
            figures.prompt_tokens_limit,
        )

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge

    def _total(self, name: str, text: str, value: float) -> CounterMetricFamily:
        total = CounterMetricFamily(name, text, labels=["model_name"])
        total.add_metric([self._model], value)
        return total


def _names(tally: Tally[str]) -> str:
    return ",".join(sorted(name for name, count in tally.items() if count))


class ServingMetrics:
    """Counts and times requests; `text` is what GET /metrics answers."""

    def __init__(
        self,
        model: str,
        figures: Callable[[], EngineFigures | None],
        keys: Callable[[], Mapping[str, KeyFigures]] = dict,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Keys(keys))
        self._gauges = _Gauges(model, figures)
        self._registry.register(self._gauges)
        self._model = model
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that have their first token"
        )
        self._new_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self._success = self._counter("vllm:request_success", "Answers finished", "finished_reason")
        self._refused = self._counter("runtime:requests_refused", "Requests answered with an error", "status")
        self._adapter_failures = self._counter(
            "runtime:adapter_failures", "Adapters that were not loaded", "reason"
        )
        self._adapter_hits = self._counter(
            "runtime:adapter_hits", "Requests whose adapter from a registry was in memory"
        )
        self._adapter_loads = self._histogram(
            "runtime:adapter_load_seconds", "From the first request for an adapter to its being in memory"
        )
        self._adapter_evictions = self._counter(
            "runtime:adapter_evictions", "Adapters from a registry that made room for others", "place"
        )
        self._queued = self._histogram(
            "vllm:request_queue_time_seconds", "Time a request waited in the queue"
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token")
        self._between = self._histogram("vllm:inter_token_latency_seconds", "One token to the next")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token")
        self._prompt_size = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request", _TOKENS
        )
        self._answer_size = self._histogram("vllm:request_generation_tokens", "Tokens per answer", _TOKENS)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def admitted(self, prompt_tokens: int) -> None:
        """Count a request that the engine has taken."""
        self._prompt_size.labels(self._model).observe(prompt_tokens)

    def left_queue(self, queued_s: float) -> None:
        """Record how long a request waited for the engine."""
        self._queued.labels(self._model).observe(queued_s)

    def first_token(self, seconds: float, *, prompt_tokens: int) -> None:
        """Record an answer's first token, `seconds` after the request arrived: its prompt is processed."""
        self._prompt_tokens.labels(self._model).inc(prompt_tokens)
        self._first.labels(self._model).observe(seconds)
        self._new_tokens.labels(self._model).inc()

    def next_token(self, seconds: float) -> None:
        """Record a further token, `seconds` after the one before."""
        self._between.labels(self._model).observe(seconds)
        self._new_tokens.labels(self._model).inc()

    def finished(self, reason: str, *, seconds: float, tokens: int) -> None:
        """Record a complete answer."""
        self._success.labels(self._model, reason).inc()
        self._whole.labels(self._model).observe(seconds)
        self._answer_size.labels(self._model).observe(tokens)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(self._model, str(status)).inc()

    def adapter_failed(self, reason: str) -> None:
        """Count an adapter that was not loaded."""
        self._adapter_failures.labels(self._model, reason).inc()

    def adapter_hit(self) -> None:
        """Count a request whose adapter was in memory."""
        self._adapter_hits.labels(self._model).inc()

    def adapter_loaded(self, seconds: float) -> None:
        """Record that an adapter was pulled, where it was not on disk, and read."""
        self._adapter_loads.labels(self._model).observe(seconds)

    def adapter_evicted(self, place: Literal["memory", "disk"]) -> None:
        """Count an adapter that made room for another."""
        self._adapter_evictions.labels(self._model, place).inc()

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[Callable[[], None]]:
        """Count a request for `name` as waiting, and as running once the yielded function is called."""
        if name is None:
            yield lambda: None
            return
        tally = self._gauges.waiting

        def started() -> None:
            nonlocal tally
            tally[name] -= 1
            tally = self._gauges.running
            tally[name] += 1

        tally[name] += 1
        try:
            yield started
        finally:
            tally[name] -= 1

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry)
