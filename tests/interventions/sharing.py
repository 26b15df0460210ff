"""Processes that change names of one shared state folder at the same time, some of them killed.

Run as a module, with an empty folder and how many files each writer uploads; prints what was done.
It forks, so it must have no other threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from reft_runtime.errors import NotFound
from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry.remote import store
from tests.interventions.make import BASE, file_bytes

NAMES = ("all", "own-0", "own-1", "own-2")
"""What all writers upload to and none removes, and what one writer removes now and then."""

store.SWEEP_SECONDS = 1.0  # so that there is much to delete


def opened(state: Path) -> Registry:
    return Registry(BASE, state_dir=state, shared_state=True)


def write(root: Path, writer: int, count: int) -> None:
    """Upload files, each another one, and write down what the uploads changed."""
    chance = random.Random(writer)
    registry = opened(root / "state")
    with (root / f"changes-{os.getpid()}").open("w", buffering=1) as told:
        for number in range(count):
            name = chance.choice(("all", f"own-{writer}"))
            change = registry.put(name, file_bytes(description=f"{os.getpid()} {number}"))
            print(json.dumps([name, change.before, change.after]), file=told)
            if name != "all" and chance.random() < 0.3:
                registry.remove(name)
    registry.close()


def join(state: Path) -> None:
    """Join again and again, delete what no pointer names, and change names without an upload."""
    while True:
        registry = opened(state)
        for name in NAMES:
            try:
                registry.pin(name)
                registry.unpin(name)
            except NotFound:
                continue
        registry.close()


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)  # it was still at work


def change_at_once(root: Path, count: int) -> int:
    """Let writers write, one that is killed again and again among them; how often it was."""
    chance, killed = random.Random(0), 0
    writers = {forked(partial(write, root, writer, count)) for writer in range(2)}
    joining = forked(partial(join, root / "state"))
    try:
        while writers:
            victim = forked(partial(write, root, 2, 10**6))
            time.sleep(chance.uniform(0.05, 0.3))
            kill(victim)
            killed += 1
            for writer in list(writers):
                done, status = os.waitpid(writer, os.WNOHANG)
                if done:
                    writers.remove(writer)
                    assert status == 0
    finally:
        for child in (*writers, joining):
            kill(child)
    return killed


def main(root: Path, count: int) -> None:
    torch.set_num_threads(1)
    state, killed = root / "state", change_at_once(root, count)
    registry = opened(state)
    assert registry.problems() == {}
    assert {"all"} <= {entry.name for entry in registry.entries()} <= set(NAMES)
    for entry in registry.entries():
        for version in registry.versions_of(entry.name):
            assert (state / "blobs" / f"{version.digest}.safetensors").exists()
            assert registry.resolve(f"{entry.name}@{version.digest}").edits()
    registry.close()
    lines = [line for file in root.glob("changes-*") for line in file.read_text().splitlines()]
    made = [json.loads(line) for line in lines]
    replaced = [before for name, before, _ in made if name == "all" and before]
    # Each upload is another file: if two replaced the same version, the first of them was lost.
    assert len(replaced) == len(set(replaced))
    print(json.dumps({"uploads": len(made), "of one name": len(replaced), "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
