"""A running server at a glance, for a terminal."""

from __future__ import annotations

import time
from itertools import takewhile

from rich.console import Group, RenderableType

from reft_runtime.client import Body, Server
from server.cli.console import size, table


def busy(server: Server) -> list[Body]:
    """The interventions that requests in flight use, the busiest first."""
    entries = server.listing(sort="-in_flight")
    return list(takewhile(lambda entry: entry["in_flight"], entries))


def overview(stats: Body, used: list[Body]) -> RenderableType:
    """What `/v1/stats` says, and the interventions in use."""
    speed, kv, own = stats["tokens_per_second"], stats["kv_cache"], stats["interventions"]
    first, later = stats["time_to_first_token_seconds"], stats["time_per_output_token_seconds"]
    lines = [
        ("model", f"{stats['model']}, {stats['dtype']} on {stats['device']}, {stats['status']}"),
        *(("problem", problem) for problem in stats["problems"]),
        ("up", _span(stats["uptime_seconds"])),
        (
            "requests",
            f"{stats['running']} running of {stats['max_running']}, {stats['waiting']} waiting",
        ),
        ("tokens/s", f"{speed['generation']:.1f} generated, {speed['prompt']:.1f} of prompts"),
        ("first token", _percentiles(first)),
        ("each next", _percentiles(later)),
        ("cache", f"{kv['usage']:.0%} of {kv['tokens']:,} tokens{_hits(stats)}"),
        (
            "interventions",
            f"{own['registered']:,}, {own['loaded']:,} in memory, "
            f"{size(own['bytes'])} of {size(own['max_bytes'])}",
        ),
    ]
    grid = table({"": "whole", " ": "fold"}, lines)
    grid.show_header = False
    if not used:
        return grid
    rows = [(entry["id"], f"{entry['in_flight']:,}", f"{entry['requests']:,}") for entry in used]
    return Group(
        grid, "", table({"in use": "whole", "in flight": "right", "requests": "right"}, rows)
    )


def _percentiles(durations: Body) -> str:
    if not durations["count"]:
        return f"no request in the last {durations['seconds']:.0f} s"
    return f"{durations['p50']:.3g} s median, {durations['p95']:.3g} s 95th percentile"


def _hits(stats: Body) -> str:
    cache = stats["prefix_cache"]
    if cache is None or cache["hit_rate"] is None:
        return ""
    return f", {cache['hit_rate']:.0%} of prompt tokens found in it"


def _span(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} days {clock}" if days else clock
