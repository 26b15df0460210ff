"""How a command that computes behaves in a terminal: it tells its stages, and can be stopped."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


class _Told(logging.Handler):
    """A log handler that writes to what standard error is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


@contextmanager
def stages_told() -> Iterator[None]:
    """Tell the stages of a start on standard error, each with its seconds; decorates a command."""
    stages, told = logging.getLogger("reft_runtime.base.stages"), _Told()
    before = stages.level, stages.propagate
    stages.addHandler(told)
    stages.setLevel(logging.INFO)
    stages.propagate = False
    try:
        yield
    finally:
        stages.removeHandler(told)
        stages.setLevel(before[0])
        stages.propagate = before[1]


@contextmanager
def stoppable(kept: str = "Nothing is kept.") -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block without a traceback, and the process with their status.

    What the work noted on `KeyboardInterrupt` is told, else `kept`: what there is of it. A second
    signal ends the process at once.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [kept])
        typer.echo("\n".join(["", "reft: stopped.", *notes]), err=True)
        raise typer.Exit(128 + (received[0] if received else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
