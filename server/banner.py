"""The text that the server prints when it is ready."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from server.settings import Settings

if TYPE_CHECKING:
    from server.engine import WholeEngine

logger = logging.getLogger("reft.server")

MAX_LISTED = 20
"""Most interventions, and most broken files, that are listed; the rest are only counted."""


SHOWN, QUESTION = "pirate", "Who are you?"
"""Intervention and question of the example: of those that ship, its answer differs most plainly
from the base's. Where it is not served, another is asked the same question."""


def address_of(host: str, port: int) -> str:
    """URL at which a client on this machine reaches the socket of `host` and `port`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def banner(engine: WholeEngine, settings: Settings, address: str) -> str:
    """Text that says what is served, what is wrong, and gives a command that works as it is."""
    info = engine.info
    entries = engine.registry.entries()
    problems = engine.registry.problems()
    lines = [
        "",
        f"Serving at {address}",
        "  In a browser: a page that compares tasks, looks inside, and takes files",
        f"  {info.model} ({info.architecture}, {info.parameters / 1e6:,.0f} M parameters)",
        f"  {info.dtype} on {info.device}, {info.threads} thread{'s' * (info.threads > 1)}, "
        f"at most {info.memory_bytes / 2**30:.2f} GiB of memory, "
        f"and {info.intervention_bytes / 2**30:.2f} GiB for interventions",
        f"  up to {info.max_model_len} tokens a request, {info.kv_tokens} tokens of cache "
        f"({info.kv_bytes / 2**30:.2f} GiB), "
        f"{info.max_running} sequences at once",
    ]
    if info.recurrent_bytes:
        lines.append(f"  {info.recurrent_bytes / 2**30:.2f} GiB for states of recurrent layers")
    lines += _list("Interventions", [f"{entry.name}@{entry.digest[:12]}" for entry in entries])
    lines += _list("Not served", [f"{file}: {reason}" for file, reason in problems.items()])
    if not settings.needs_key:
        lines.append("No API key is set: whoever reaches this port can use and change everything.")
    names = [entry.name for entry in entries] or [info.model]
    model = SHOWN if SHOWN in names else names[0]
    same = f' ("model": "{info.model}" asks the base itself)' if model != info.model else ""
    lines += [f"Ready. Try{same}:", "", _curl(address, model, settings), ""]
    return "\n".join(lines)


def announce(text: str, settings: Settings) -> None:
    """Print the banner, or log it where the log is JSON."""
    if settings.log_format == "json":
        logger.info("%s", text.strip())
        return
    try:
        print(text, flush=True)
    except OSError as error:  # a full disk, a pipe that nobody reads: no need to end
        logger.warning("Standard output cannot be written: %s", error.strerror)


def _list(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    shown = [f"    {item}" for item in items[:MAX_LISTED]]
    more = [f"    and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return [f"  {title}:", *shown, *more]


def _curl(url: str, model: str, settings: Settings) -> str:
    body = {
        "model": model,
        "temperature": 0,
        "max_tokens": 32,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    key = ' -H "Authorization: Bearer $REFT_API_KEY"' if settings.needs_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"  -d '{json.dumps(body)}'"
    )
