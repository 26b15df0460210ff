"""Prometheus metrics. Their names follow vLLM's, with the prefix `reft:`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.recent import Durations

if TYPE_CHECKING:
    from reft_runtime.outputs import PrefixCacheStats
    from server.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format. It is not negotiated: in the other formats older Prometheus servers get
`reft_` instead of `reft:`."""

MAX_NAMES = 100
"""Most interventions with a label of their own; later ones share the label `(other)`."""

BASE, OTHER = "(base)", "(other)"
"""Labels that no intervention can have, as a name cannot contain a parenthesis."""

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40, 160)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """What the routes count, and the engine's own numbers, in one registry."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self.recent_first_token, self.recent_per_token = Durations(), Durations()
        self._finished = Counter(
            "reft:request_success",
            "Choices that ended, by reason.",
            ["finished_reason"],
            registry=self.registry,
        )
        self._cut = Counter(
            "reft:connections_cut",
            "Connections that ended before their answer was whole, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "reft:time_to_first_token_seconds", "From arrival to first token.", _FIRST_TOKEN
        )
        self._per_token = self._histogram(
            "reft:time_per_output_token_seconds", "Between a choice's tokens.", _PER_TOKEN
        )
        self._whole = self._histogram(
            "reft:e2e_request_latency_seconds", "From arrival to the end.", _WHOLE
        )
        self._queue = self._histogram(
            "reft:request_queue_time_seconds", "Waiting for the engine.", _WHOLE
        )
        self._swap = self._histogram(
            "reft:intervention_swap_seconds", "Checking and publishing a file.", _FIRST_TOKEN
        )
        self._requests, self._prompt, self._tokens, self._loads = (
            Counter(f"reft:intervention_{name}", text, ["intervention"], registry=self.registry)
            for name, text in (
                ("requests", "Requests that named the intervention."),
                ("prompt_tokens", "Prompt tokens of these requests."),
                ("generation_tokens", "Tokens generated under the intervention."),
                ("loads", "Times a file was published under the name."),
            )
        )
        self.registry.register(_EngineCollector(engine))

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, buckets=tuple(buckets), registry=self.registry)

    def text(self) -> bytes:
        """Present values of all metrics, in the format `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def first_token(self, seconds: float, queued: float | None) -> None:
        """Record a request's first token, `seconds` after its arrival, `queued` of them waiting."""
        self._first_token.observe(seconds)
        self.recent_first_token.observe(seconds)
        if queued is not None:
            self._queue.observe(queued)

    def next_token(self, seconds: float) -> None:
        """Record a further token, `seconds` after the one before it."""
        self._per_token.observe(seconds)
        self.recent_per_token.observe(seconds)

    def finished(
        self, seconds: float, reasons: Iterable[str], names: Iterable[str], prompt: int, tokens: int
    ) -> None:
        """Record a request's end: a reason for each choice, its interventions, its tokens."""
        self._whole.observe(seconds)
        for reason in reasons:
            self._finished.labels(reason).inc()
        for name in names or (BASE,):
            label = self._label(name)
            self._requests.labels(label).inc()
            self._prompt.labels(label).inc(prompt)
            self._tokens.labels(label).inc(tokens)

    def outcomes(self) -> dict[str, int]:
        """Number of choices that ended since the start, by reason."""
        [family] = self._finished.collect()
        return {
            sample.labels["finished_reason"]: int(sample.value)
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def loaded(self, name: str, seconds: float) -> None:
        """Record that a file was published as `name`, which took `seconds`."""
        self._swap.observe(seconds)
        self._loads.labels(self._label(name)).inc()

    def cut(self, reason: str) -> None:
        """Record a connection that ended early: its client left, was too slow, or had no room."""
        self._cut.labels(reason).inc()

    def _label(self, name: str) -> str:
        with self._lock:
            if name == BASE or name in self._names:
                return name
            if len(self._names) < MAX_NAMES:
                self._names.add(name)
                return name
        return OTHER


class _EngineCollector(Collector):
    """The engine's numbers, read when Prometheus scrapes them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """No metrics, so that the registry does not ask the engine at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters with their present values."""
        stats = self._engine.stats()
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", stats.running),
            ("num_requests_waiting", "Requests in the queue.", stats.waiting),
            ("kv_cache_usage_perc", "Used part of the key-value cache, 1 is all.", stats.kv_usage),
        ):
            yield GaugeMetricFamily(f"reft:{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("num_preemptions", "Sequences preempted for lack of cache.", stats.preemptions),
        ):
            yield CounterMetricFamily(f"reft:{name}", text, value)
        yield from _prefix_cache(stats.prefix_cache)
        family = GaugeMetricFamily("reft:interventions", "Interventions by tier.", labels=["tier"])
        for tier, count in self._engine.registry.tiers().items():
            family.add_metric([tier], count)
        yield family
        up = GaugeMetricFamily(
            "reft:source_up", "Whether a source of interventions can be read.", labels=["source"]
        )
        for source in self._engine.registry.sources():
            up.add_metric([source.label], source.problem is None)
        yield up


def _prefix_cache(stats: PrefixCacheStats | None) -> Iterator[Metric]:
    """The prefix cache's metrics; none where it is off."""
    if stats is None:
        return
    blocks = GaugeMetricFamily(
        "reft:prefix_cache_blocks", "Blocks kept for reuse.", labels=["kind"]
    )
    queries, hits = (
        CounterMetricFamily(f"reft:prefix_cache_{name}", text, labels=["kind"])
        for name, text in (
            ("queries", "Tokens looked for in the prefix cache."),
            ("hits", "Tokens found there, and not computed."),
        )
    )
    for family, values in ((blocks, stats.blocks), (queries, stats.queries), (hits, stats.hits)):
        for kind, value in values.items():
            family.add_metric([kind], value)
        yield family
    yield CounterMetricFamily(
        "reft:prefix_cache_evictions", "Blocks evicted to make room for others.", stats.evictions
    )
