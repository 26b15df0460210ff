"""What all tests need: Triton's interpreter, own cores for workers, a Ctrl-C that counts.

What their imports make stays: no garbage is looked for in it, neither then nor in a test.

The files that take longest come first, so that no worker is left with one when the rest has ended.
"""

import gc
import os
import signal
from collections.abc import Generator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from fastapi import routing
from fastapi.dependencies import utils

from reft_runtime.machine.garbage import without_collections

LONGEST = ("e2e", "cluster", "page", "parallel", "cli", "training", "http")
"""Folders, the longest first."""

if not Path("/dev/nvidiactl").exists():
    # Before anything imports Triton, as transformers does where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"

worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if worker and workers and hasattr(os, "sched_setaffinity"):
    # Two processes with two threads each would wait for each other: each has its share of cores.
    cores = sorted(os.sched_getaffinity(0))
    own = cores[int(worker.removeprefix("gw")) :: int(workers)]
    os.sched_setaffinity(0, own or cores)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has it ignored, by all that they start, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _read_once(*, dependencies: Sequence[Any], **function: Any) -> Any:
    return _read(dependencies=tuple(dependencies), **function)


# A test makes an application, or runs a command. What FastAPI and Typer find out about the same
# functions each time, they find out once.
utils.get_typed_signature = cache(utils.get_typed_signature)
_read = cache(routing._build_dependant_with_parameterless_dependencies)
routing._build_dependant_with_parameterless_dependencies = _read_once
typer.testing._get_command = cache(typer.testing._get_command)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with without_collections():
        found = yield
    gc.freeze()
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by folder; files and their tests keep their order."""
    here = Path(__file__).parent
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(here).parts[0], len(order)))
