"""What several replicas say of themselves, as one server would say it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.tenants.usage import Counts, Found

SILENT_METRIC = "reft:replicas_silent"

_LARGEST = {"max_model_len", "registered", "max_bytes", "seconds", "uptime_seconds", "time"}
"""Numbers of which the largest counts; others are added, or averaged as `_MEANS` says."""

_MEANS = {"usage"}

_DURATIONS = {"time_to_first_token_seconds", "time_per_output_token_seconds"}


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def metrics_text(by_replica: Mapping[str, Sequence[Metric]], late: int) -> bytes:
    """Metrics of all replicas in Prometheus' text format, each sample with the label `replica`.

    Another one says how many have not told theirs in time, which are `late`.
    """
    silent = GaugeMetricFamily(SILENT_METRIC, "Replicas that did not answer.", value=late)
    families: dict[str, Metric] = {silent.name: silent}
    for replica, metrics in by_replica.items():
        for metric in metrics:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


def stats_sum(all_stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what replicas say in /v1/stats, with their number as `replicas`.

    Counts are added. Of durations those of the slowest replica are told, as there is no sum of
    medians. Texts are those of the first replica, but for a status that is not `ok` and for
    problems, which are all told.
    """
    total = _sum(all_stats)
    total["status"] = next((one["status"] for one in all_stats if one["status"] != "ok"), "ok")
    total["problems"] = list(dict.fromkeys(p for one in all_stats for p in one["problems"]))
    for name in _DURATIONS:
        total[name] = max((one[name] for one in all_stats), key=lambda told: told["p95"] or 0.0)
    cache = total["prefix_cache"]
    if cache is not None:
        cache["hit_rate"] = cache["hits"] / cache["queries"] if cache["queries"] else None
    return {**total, "replicas": len(all_stats)}


def missing(late: int) -> list[str]:
    """What is wrong with a sum over replicas of which so many did not answer."""
    if not late:
        return []
    return [f"{late} of the replicas did not answer in time: what they have counted is missing"]


def _sum(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: _one(name, [one.get(name) for one in values]) for name in values[0]}


def _one(name: str, values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], Mapping):
        return _sum(known)
    if not isinstance(known[0], int | float) or isinstance(known[0], bool):
        return known[0]
    if name in _LARGEST:
        return max(known)
    return sum(known) / len(known) if name in _MEANS else sum(known)


def usage_sum(found: Sequence[Found], most: int) -> Found:
    """What several counted, added up by groups, and sorted by them; at most `most` rows."""
    rows: dict[tuple[str, ...], Counts] = {}
    for one in found:
        for groups, counts in one.rows:
            before = rows.get(groups, Counts())
            rows[groups] = Counts(*map(sum, zip(before, counts, strict=True)))
    return Found(sorted(rows.items())[:most], min(one.since for one in found))
