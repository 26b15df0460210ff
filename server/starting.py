"""From settings to a running engine: what `reft serve`, a command and a cluster's replica start."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from reft_runtime.base.model_files import check_named
from reft_runtime.base.stages import stage
from reft_runtime.machine.garbage import without_collections
from reft_runtime.quiet import hide_messages_on_cpu
from server.settings import Settings

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine
    from reft_runtime.parallel.launch import Launcher


def check_folders(settings: Settings) -> None:
    """Raise `ConfigError` for a folder of interventions that is not there; imports no torch."""
    from reft_runtime.interventions.registry.sources import Folder

    for folder in settings.folders:
        Folder(folder)


def start_engine(settings: Settings, launcher: Launcher | None = None) -> Engine:
    """The engine that settings ask for; `launcher` starts its ranks, if it has several."""
    check_named(settings.model)
    check_folders(settings)
    if settings.device == "cpu":
        hide_messages_on_cpu()
    with without_collections():
        with stage("Starting Python's libraries"):
            from reft_runtime.front.engine import Engine

        if not gc.get_freeze_count():
            # What libraries made stays: the collection after the load need not look at it (0.2 s).
            gc.freeze()
        return Engine(settings.model, launcher=launcher, **settings.engine_options())
