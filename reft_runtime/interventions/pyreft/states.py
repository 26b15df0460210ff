"""Reads state dicts out of pickles, by a process that does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.pyreft import unpickle

MAX_SECONDS = 600


def read_states(paths: Sequence[Path]) -> list[dict[str, Tensor]]:
    """State dicts of `.bin` files, each with R plain. Raises `InvalidFile` that names the file."""
    return _read(paths, None)


def read_slice(path: Path, along: Mapping[str, int], place: int) -> Tensor:
    """One row or column of the first of the tensors named in `along` that a file has.

    `along` says for each along which dimension `place` counts. No more than that is read. Raises
    `InvalidFile` that names the file.
    """
    return _read([path], unpickle.Slice(place, along))[0][unpickle.ALONE]


def read_named(paths: Sequence[Path], pattern: str) -> list[dict[str, Tensor]]:
    """Of each file the tensors whose names a regular expression fits, which may be none.

    No more than these is read, however large the files are. Raises `InvalidFile` that names the
    file.
    """
    return _read(paths, pattern)


def _read(paths: Sequence[Path], part: unpickle.Part | None) -> list[dict[str, Tensor]]:
    # -P and another working directory, so that no file in this one is imported as a module.
    command = [sys.executable, "-P", unpickle.__file__, json.dumps(part)]
    command += map(os.path.abspath, paths)
    try:
        done = subprocess.run(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise InvalidFile(f"Reading the checkpoint took more than {MAX_SECONDS} s.") from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == unpickle.REFUSED:
        raise InvalidFile(said)
    if done.returncode:
        last = "".join(said.splitlines()[-1:])[:300]
        raise InvalidFile(f"Reading the checkpoint failed (exit status {done.returncode}): {last}")
    states: list[dict[str, Tensor]] = [{} for _ in paths]
    for name, tensor in safetensors.torch.load(done.stdout).items():
        index, _, key = name.partition(".")
        states[int(index)][key] = tensor
    return states
