"""The state folder: what was uploaded, as content-addressed blobs and pointers with history.

`blobs/<digest>.safetensors` are immutable; `pointers/<name>.json` names the digests of an
intervention's versions, newest first, and is replaced in one atomic step. The same layout works on
an object store.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.file import SUFFIX, sync_folder, write_atomic
from reft_runtime.interventions.sources import NAME

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Store:
    """Blobs and pointers under one folder, which belongs to one process at a time.

    `histories` are the digests of each name's versions, the current one first; `damaged` are the
    names whose pointer cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._pointers = folder / "pointers"
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._pointers.mkdir(exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"The state folder cannot be written: {error}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"The state folder {folder} is in use by another server; give each its own."
            ) from None
        for stray in [*self._blobs.glob(".*.tmp"), *self._pointers.glob(".*.tmp")]:
            stray.unlink()  # left by a crash in the middle of a write
        self.histories: dict[str, tuple[str, ...]] = {}
        self.damaged: set[str] = set()
        for path in sorted(self._pointers.glob("*.json")):
            digests = _read_pointer(path) if NAME.fullmatch(path.stem) else ()
            if digests:
                self.histories[path.stem] = digests
            else:
                self.damaged.add(path.stem)

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def blob(self, digest: str) -> Path:
        """Where the file of this digest is kept."""
        return self._blobs / f"{digest}{SUFFIX}"

    def add_blob(self, digest: str, data: bytes) -> None:
        """Keep a file; `digest` is its identity."""
        write_atomic(self.blob(digest), data)

    def point(self, name: str, digests: Sequence[str]) -> None:
        """Let a name stand for the first of `digests`; the others are its history."""
        write_atomic(self._pointer(name), json.dumps({"versions": list(digests)}).encode())
        self.histories[name] = tuple(digests)
        self.damaged.discard(name)

    def remove(self, name: str) -> None:
        """Forget a name."""
        self._pointer(name).unlink(missing_ok=True)
        sync_folder(self._pointers)
        self.histories.pop(name, None)

    def collect(self, keep: Iterable[str]) -> None:
        """Delete the blobs that no pointer names and that are not in `keep`."""
        if self.damaged:
            return  # a damaged pointer may name any of them: a person decides
        used = set(keep).union(*self.histories.values())
        for blob in self._blobs.glob(f"*{SUFFIX}"):
            if blob.stem not in used:
                blob.unlink()

    def _pointer(self, name: str) -> Path:
        return self._pointers / f"{name}.json"


def _read_pointer(path: Path) -> tuple[str, ...]:
    try:
        digests = json.loads(path.read_bytes())["versions"]
        return tuple(digests) if all(_DIGEST.fullmatch(digest) for digest in digests) else ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
