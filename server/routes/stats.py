"""GET /v1/stats: the server at a glance, from the counters that /metrics has, too."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import Response

from reft_runtime.stats import PrefixCacheStats
from reft_runtime.version import VERSION
from server.context import Context, Current
from server.openapi import answers
from server.recent import DURATIONS_SECONDS, RATES_SECONDS, Durations
from server.schemas.answers.operations import LastDurations, PrefixCache, Stats
from server.streaming import json_answer

router = APIRouter(tags=["operations"])

OUTCOMES = ("stop", "length", "abort", "error")


@router.get("/v1/stats", summary="See the server at a glance", responses=answers(Stats))
async def get_stats(context: Current) -> Response:
    """The server at a glance: what is loaded, its load and speed, and how requests ended."""
    if context.replicas is not None:
        return json_answer(await context.replicas.stats())
    return json_answer(await context.administer(stats_of, context))


def stats_of(context: Context) -> Stats:
    """What this server says of itself; it may take long."""
    engine, metrics = context.engine, context.metrics
    info, now = engine.info, engine.stats()
    prompt, generated = context.rates.until(now)
    tiers = context.registry.tiers()
    return {
        "object": "stats",
        "version": VERSION,
        "model": info.model,
        "device": info.device,
        "dtype": info.dtype,
        "status": context.health.status,
        "problems": _problems(context),
        "time": time.time(),
        "uptime_seconds": time.monotonic() - context.up_since,
        "running": now.running,
        "max_running": info.max_running,
        "waiting": now.waiting,
        "preemptions": now.preemptions,
        "prompt_tokens": now.prompt_tokens,
        "generation_tokens": now.generation_tokens,
        "tokens_per_second": {"prompt": prompt, "generation": generated, "seconds": RATES_SECONDS},
        "time_to_first_token_seconds": _durations(metrics.recent_first_token),
        "time_per_output_token_seconds": _durations(metrics.recent_per_token),
        "kv_cache": {"usage": now.kv_usage, "tokens": info.kv_tokens, "bytes": info.kv_bytes},
        "prefix_cache": _prefix_cache(now.prefix_cache),
        "interventions": {
            "registered": sum(tiers.values()),
            "loaded": tiers["host"],
            "waiting": context.registry.waiting(),
            "bytes": context.registry.held_bytes(),
            "max_bytes": info.intervention_bytes,
        },
        "finished": dict.fromkeys(OUTCOMES, 0) | metrics.outcomes(),
    }


def _problems(context: Context) -> list[str]:
    """What is wrong without keeping the server from answering; as in /readyz, with the places."""
    sources = (f"{one.label}: {one.problem}" for one in context.registry.sources() if one.problem)
    state = context.registry.state_problem()
    return [*sources, *([] if state is None else [state]), *context.problems()]


def _durations(recent: Durations) -> LastDurations:
    count, (median, high) = recent.percentiles(0.5, 0.95)
    return {"p50": median, "p95": high, "count": count, "seconds": DURATIONS_SECONDS}


def _prefix_cache(stats: PrefixCacheStats | None) -> PrefixCache | None:
    """The prefix cache since the start, blocks of both kinds together; None if it is off."""
    if stats is None:
        return None
    queries, hits = sum(stats.queries.values()), sum(stats.hits.values())
    kept = stats.snapshots
    return {
        "queries": queries,
        "hits": hits,
        "hit_rate": hits / queries if queries else None,
        "blocks": sum(stats.blocks.values()),
        "snapshots": None
        if kept is None
        else {
            "kept": kept.kept,
            "places": kept.places,
            "hits": kept.hits,
            "evictions": kept.evictions,
        },
    }
