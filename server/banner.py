"""What the server says when it is ready."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from server.settings import Settings

if TYPE_CHECKING:
    from reft_runtime.llm import Engine

MAX_LISTED = 20
"""Interventions, and broken files, that are listed; the rest are counted."""


def banner(engine: Engine, settings: Settings, host: str, port: int) -> str:
    """What is served, what is wrong, and a command that works as it stands."""
    info = engine.info
    entries = engine.registry.entries()
    problems = engine.registry.problems()
    lines = [
        "",
        f"Serving {info.model} ({info.architecture}, {info.parameters / 1e6:,.0f} M parameters)",
        f"  {info.dtype} on {info.device}, {info.threads} threads, "
        f"at most {info.memory_bytes / 2**30:.2f} GiB of memory, "
        f"and {info.intervention_bytes / 2**30:.2f} GiB for interventions",
        f"  up to {info.max_model_len} tokens a request, {info.kv_tokens} tokens of cache "
        f"({info.kv_bytes / 2**30:.2f} GiB), "
        f"{info.max_running} sequences at once",
    ]
    lines += _list("Interventions", [f"{entry.name}@{entry.digest[:12]}" for entry in entries])
    lines += _list("Not served", [f"{file}: {reason}" for file, reason in problems.items()])
    if settings.api_key is None:
        lines.append("No API key is set: whoever reaches this port can use and change everything.")
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{reachable}]" if ":" in reachable else reachable
    model = entries[0].name if entries else info.model
    lines += ["Ready. Try:", "", _curl(f"http://{address}:{port}", model, settings), ""]
    return "\n".join(lines)


def _list(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    shown = [f"    {item}" for item in items[:MAX_LISTED]]
    more = [f"    and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return [f"  {title}:", *shown, *more]


def _curl(url: str, model: str, settings: Settings) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 64,
    }
    key = ' -H "Authorization: Bearer $REFT_API_KEY"' if settings.api_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"  -d '{json.dumps(body)}'"
    )
