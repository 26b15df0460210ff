"""The command `chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from reft_runtime.machine.cache import cache_folder
from reft_runtime.sampling import SamplingParams
from server.cli.backend import open_backend
from server.cli.conversation import Chat
from server.cli.options import (
    LOCAL_SETTINGS,
    ApiKey,
    Composed,
    MaxTokens,
    MaybeUrl,
    Seed,
    System,
    Temperature,
    with_settings,
)

app = typer.Typer()

KEPT_LINES = 1000
"""The next chat finds this many lines of the history."""


@app.command()
@with_settings(*LOCAL_SETTINGS)
def chat(
    intervention: Composed = None,
    system: System = None,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    **options: Any,
) -> None:
    """Talk with the model, and change what is applied as you go.

    A running server is asked (--url, or the one of this machine), else a model in this process.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    backend = open_backend(url, api_key, options, intervention or ())
    try:
        talk = Chat(backend, sampling, intervention or [], system)
        with _history():
            talk.run(_read)
    finally:
        backend.close()


def _read(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


@contextmanager
def _history() -> Iterator[None]:
    """Let typed lines be edited, and found by the next chat; without a terminal do nothing."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # a Python that was built without it
        yield
        return
    path = cache_folder() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(KEPT_LINES)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
