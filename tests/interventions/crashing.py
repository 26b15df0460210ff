"""Kills a process before each file operation of each change of a registry, and looks after it.

Run as a module, with a folder to work in; prints how many times each change was killed. It forks,
so it must have no other threads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reft_runtime.interventions import Registry
from tests.interventions.make import BASE, file_bytes

KILLED = 9
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
ONE, TWO, THREE = (file_bytes(seed) for seed in (1, 2, 3))

CHANGES: dict[str, Callable[[Registry], object]] = {
    "put a new name": lambda registry: registry.put("new", THREE),
    "replace": lambda registry: registry.put("a", THREE),
    "put what is kept": lambda registry: registry.put("a", ONE),
    "replace what is pinned": lambda registry: registry.put("p", TWO),
    "roll back": lambda registry: registry.rollback("a"),
    "pin an upload": lambda registry: registry.pin("a"),
    "pin a file": lambda registry: registry.pin("f"),
    "unpin an upload": lambda registry: registry.unpin("p"),
    "unpin a file": lambda registry: registry.unpin("g"),
    "remove": lambda registry: registry.remove("a"),
    "remove what is pinned": lambda registry: registry.remove("p"),
    "load": lambda registry: registry.load("l", "f.safetensors"),
}


def opened(place: Path) -> Registry:
    return Registry(BASE, [place / "source"], state_dir=place / "state")


def prepared(place: Path) -> None:
    (place / "source").mkdir(parents=True)
    for name in "fg":
        (place / "source" / f"{name}.safetensors").write_bytes(ONE)
    registry = opened(place)
    for data in (ONE, TWO):
        registry.put("a", data)
    registry.put("p", ONE)
    registry.pin("p")
    registry.pin("g")
    registry.close()


def kept(place: Path) -> Any:
    """What a start finds: all can be read, nothing else lies in the state folder."""
    registry = opened(place)
    found = {
        entry.name: (
            entry.origin,
            entry.pinned,
            [v.digest for v in registry.versions_of(entry.name)],
        )
        for entry in registry.entries()
    }
    assert registry.problems() == {}
    digests = set()
    for name, (origin, _, versions) in found.items():
        for digest in versions:
            assert registry.resolve(f"{name}@{digest}").edits()
        digests |= set(versions) if origin == "uploaded" else set()
    state = place / "state"
    assert {path.stem for path in (state / "blobs").iterdir()} == digests
    assert not list((state / "incoming").iterdir())
    assert all(path.suffix == ".json" for path in (state / "pointers").iterdir())
    registry.close()
    return found


def changed(place: Path, change: str, point: int) -> bool:
    """Make a change in a process of its own that ends before a file operation; False if it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, KILLED), (change, point, code)
        return code == 0
    try:
        registry = opened(place)
        left = point

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in EVENTS:
                left -= 1
                if not left:
                    os._exit(KILLED)

        sys.addaudithook(count)
        CHANGES[change](registry)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    prepared(root / "before")
    before = kept(root / "before")
    killed = {}
    for change in CHANGES:
        done, point, found = False, 0, []
        while not done:
            point += 1
            place = root / "place"
            shutil.copytree(root / "before", place, copy_function=shutil.copy2)
            done = changed(place, change, point)
            found.append(kept(place))
            shutil.rmtree(place)
        after = found[-1]
        assert all(each in (before, after) for each in found), change
        assert found == sorted(found, key=lambda each: each != before), change  # never back
        killed[change] = point - 1
    print(json.dumps(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
