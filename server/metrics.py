"""Prometheus metrics. Their names follow vLLM's, with the prefix `reft:`."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.recent import Durations
from server.tenants.usage import BASE, OTHER

if TYPE_CHECKING:
    from reft_runtime.stats import EngineStats, PrefixCacheStats
    from server.engine import WholeEngine
    from server.tenants.usage import Counts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format. It is not negotiated: in the other formats older Prometheus servers get
`reft_` instead of `reft:`."""

MAX_NAMES = 100
"""Most interventions, and most tenants, with a label of their own; others share `(other)`."""

KEPT_SECONDS = 3600
"""A label that was not used for this long makes room for another."""

MAX_LISTED = 100
"""Most interventions that `vllm:lora_requests_info` lists: those that were used last."""

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 40, 160)
_PER_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class UnderWay(Protocol):
    """What metrics read of a request under way."""

    @property
    def names(self) -> list[str]:
        """Names of its interventions."""

    @property
    def queue_seconds(self) -> float | None:
        """Seconds that it waited; None while it waits."""


class Metrics:
    """What the routes count, and the engine's own numbers, in one registry."""

    def __init__(self, engine: WholeEngine) -> None:
        self.registry = CollectorRegistry()
        self.under_way: set[UnderWay] = set()
        """The requests under way; the routes add and remove them."""
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
        *used, self._loads = (
            Counter(f"reft:intervention_{name}", text, ["intervention"], registry=self.registry)
            for name, text in (
                ("requests", "Requests that named the intervention."),
                ("prompt_tokens", "Prompt tokens of these requests."),
                ("cached_tokens", "Those of them that the prefix cache had."),
                ("generation_tokens", "Tokens generated under the intervention."),
                ("loads", "Times a file was published under the name."),
            )
        )
        self._interventions = _Labels("intervention", used, [self._loads])
        used = [
            Counter(f"reft:tenant_{name}", text, ["tenant"], registry=self.registry)
            for name, text in (
                ("requests", "Requests of the tenant."),
                ("prompt_tokens", "Prompt tokens of these requests."),
                ("cached_tokens", "Those of them that the prefix cache had."),
                ("generation_tokens", "Tokens generated for the tenant."),
            )
        ]
        self._rejected = Counter(
            "reft:requests_rejected",
            "Requests that were refused for a quota or for want of room, by reason.",
            ["tenant", "reason"],
            registry=self.registry,
        )
        self._tenants = _Labels("tenant", used, [self._rejected])
        self.problems = Gauge(
            "reft:problems",
            "What is wrong with the keys file, usage, quotas, traces or the state.",
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine, self.under_way))

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
        self,
        seconds: float,
        reasons: Iterable[str],
        tenant: str,
        names: Collection[str],
        counts: Counts,
    ) -> None:
        """Record a request's end: a reason for each choice, whose it was, and what it used."""
        self._whole.observe(seconds)
        for reason in reasons:
            self._finished.labels(reason).inc()
        self._tenants.count(tenant, counts)
        for name in names or (BASE,):
            self._interventions.count(name, counts)

    def rejected(self, tenant: str, reason: str) -> None:
        """Record a request that was refused for a quota (`Reason`), or `overloaded`."""
        self._rejected.labels(self._tenants.of(tenant), reason).inc()

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
        self._loads.labels(self._interventions.of(name)).inc()

    def cut(self, reason: str) -> None:
        """Record a connection that ended early: its client left, was too slow, or had no room."""
        self._cut.labels(reason).inc()


class _Labels:
    """The names that have a label of their own: at most `MAX_NAMES`, and `(base)`.

    Where there is no room, the name that was not used for the longest time loses its label, if that
    time is `KEPT_SECONDS`, and its series end. With every use a new name would make new series
    for Prometheus to keep, without bound. `used` are the counters of `Counts`, in their order; they
    and the `others` have the names as the label `kind`.
    """

    def __init__(self, kind: str, used: list[Counter], others: list[Counter]) -> None:
        self._kind, self._used, self._others = kind, used, others
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, name: str, counts: Counts) -> None:
        """Add what a request used."""
        label = self.of(name)
        for counter, value in zip(self._used, counts, strict=True):
            counter.labels(label).inc(value)

    def of(self, name: str) -> str:
        """The label of a name that is used now."""
        if name == BASE:
            return BASE
        now = time.monotonic()
        with self._lock:
            # A dictionary in the order of use: the first is the one that was used longest ago.
            known = self._last.pop(name, None) is not None
            if not known and len(self._last) >= MAX_NAMES:
                oldest = next(iter(self._last))
                if now - self._last[oldest] < KEPT_SECONDS:
                    return OTHER
                del self._last[oldest]
                for counter in (*self._used, *self._others):
                    counter.remove_by_labels({self._kind: oldest})
            self._last[name] = now
        return name


class _EngineCollector(Collector):
    """The engine's numbers, read when Prometheus scrapes them."""

    def __init__(self, engine: WholeEngine, under_way: Collection[UnderWay]) -> None:
        self._engine = engine
        self._under_way = under_way

    def describe(self) -> Iterable[Metric]:
        """No metrics, so that the registry does not ask the engine at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters with their present values."""
        stats = self._engine.stats()
        yield from _load("reft", stats)
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
        yield from self._for_gateways(stats)

    def _for_gateways(self, stats: EngineStats) -> Iterator[Metric]:
        """What gateways that route by adapter read, under vLLM's names.

        Of `vllm:lora_requests_info` there is one series, whose labels say what is so now.
        """
        yield from _load("vllm", stats)
        yield GaugeMetricFamily("vllm:gpu_cache_usage_perc", "Its older name.", stats.kv_usage)
        cache = stats.prefix_cache
        for name, text, values in (
            ("queries", "Tokens looked for in the prefix cache.", cache and cache.queries),
            ("hits", "Tokens found there, and not computed.", cache and cache.hits),
        ):
            total = sum((values or {}).values())
            yield CounterMetricFamily(f"vllm:gpu_prefix_cache_{name}", text, total)
        used = self._engine.registry.page("", "-last_used", None, MAX_LISTED)
        waiting = dict.fromkeys(
            name for one in list(self._under_way) if one.queue_seconds is None for name in one.names
        )
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Interventions in memory, and those that requests wait for.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [
            str(used.total),
            ",".join(entry.name for entry in used.entries if entry.tier != "disk"),
            ",".join(list(waiting)[:MAX_LISTED]),
        ]
        family.add_metric(labels, time.time())
        yield family


def _load(prefix: str, stats: EngineStats) -> Iterator[Metric]:
    """The gauges of the engine's load."""
    for name, text, value in (
        ("num_requests_running", "Sequences in the batch.", stats.running),
        ("num_requests_waiting", "Requests in the queue.", stats.waiting),
        ("kv_cache_usage_perc", "Used part of the key-value cache, 1 is all.", stats.kv_usage),
    ):
        yield GaugeMetricFamily(f"{prefix}:{name}", text, value)


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
    if (snapshots := stats.snapshots) is not None:
        name = "reft:prefix_cache_snapshot"
        yield GaugeMetricFamily(f"{name}s", "Recurrent states kept for reuse.", snapshots.kept)
        yield CounterMetricFamily(
            f"{name}_hits", "Prompts that went on from a kept recurrent state.", snapshots.hits
        )
        yield CounterMetricFamily(
            f"{name}_evictions", "Recurrent states evicted for others.", snapshots.evictions
        )
