"""From settings to a running engine: what `reft serve`, a command and a cluster's replica start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_runtime.base.stages import stage
from server.settings import Settings

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine


def start_engine(settings: Settings) -> Engine:
    """The engine that settings ask for."""
    with stage("Starting Python's libraries"):
        from reft_runtime.front.engine import Engine

    return Engine(settings.model, **settings.engine_options())
