"""One immutable version of a named intervention."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

from reft_runtime.errors import InvalidFile, NotFound, Unavailable
from reft_runtime.interventions.format.canonical import CanonicalEdit, memory_of
from reft_runtime.interventions.format.file import edits_of, open_verified, read
from reft_runtime.interventions.format.header import Header, header_of
from reft_runtime.interventions.format.intervention import validate_manifest
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.interventions.format.summary import summarise
from reft_runtime.interventions.registry.sources import File
from reft_runtime.machine.cores import releasing_workers

Origin = Literal["loaded", "uploaded", "folder"]

_OBJECT_BYTES = 2048
"""Memory of a version besides its manifest and its tensors, in bytes, estimated generously."""

_GONE = "Its file in the state is gone; upload it again."


class Version:
    """What a name stood for when it was resolved: one file's content, and where it came from.

    Only the header is read at first. The tensors are read from `source`, verified and converted at
    the first call of `edits`, and may be dropped again by `evict`. Without a source, the given
    tensors are the only copy and stay. The registry makes versions. It counts in `in_flight` the
    requests that hold them, and in `users` those of them whose turn has come to use the tensors.
    """

    def __init__(
        self,
        name: str,
        header: Header,
        origin: Origin,
        source: File | None,
        edits: tuple[CanonicalEdit, ...] | None = None,
    ) -> None:
        self.name = name
        self.origin = origin
        self.digest = header.digest
        self.template = header.manifest.template
        self.system_turn = header.manifest.system_turn
        self.completion_prefix = header.manifest.completion_prefix
        self.texts = header.manifest.texts
        # As text a manifest takes a fraction of the memory, and can be listed without parsing.
        self.manifest_json = header.manifest.model_dump_json().encode()
        self.summary = summarise(header)
        self.size_bytes = header.size_bytes
        self.in_flight = 0
        self.users = 0
        self.pinned = False
        """Whether the tensors stay in memory because the name is pinned to it."""
        self.only_copy = False
        """Whether the tensors stay because the file that they came from is no longer there."""
        self.problem: str | None = None
        self.made_by: object = None
        """Stands for the registry that made it, and checked that it fits its model."""
        self._source = source
        self._edits = edits
        self._tensor_bytes = memory_of(edits or ())
        self._made = time.time()
        self._loading = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What the file says about itself; parsed anew at every call."""
        return validate_manifest(json.loads(self.manifest_json))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels among which the file says to choose; read anew at every call."""
        found = json.loads(self.manifest_json).get("labels")
        return None if found is None else tuple(found)

    @property
    def loaded(self) -> bool:
        """Whether the tensors are in memory."""
        return self._edits is not None

    @property
    def reloadable(self) -> bool:
        """Whether the tensors have a file that they can be read from again."""
        return self._source is not None

    @property
    def near(self) -> bool:
        """Whether reading the tensors waits for no network."""
        return self._source is None or self._source.on_disk()

    @property
    def stays(self) -> bool:
        """Whether the tensors must not be evicted."""
        return self.users > 0 or self.pinned or self.only_copy

    @property
    def tensor_bytes(self) -> int:
        """Memory of the tensors in bytes; 0 while they are on disk."""
        return self._tensor_bytes if self.loaded else 0

    @property
    def memory_bytes(self) -> int:
        """Memory of the tensors in bytes; while they are on disk, what it will be at most."""
        return self.tensor_bytes if self.loaded else self.summary.memory_bytes

    @property
    def listed_bytes(self) -> int:
        """Bytes of the version's line in the listing: its manifest, and a summary of that."""
        return _OBJECT_BYTES + 2 * len(self.manifest_json)

    @property
    def fixed_bytes(self) -> int:
        """Memory that the version takes as long as it can be addressed, in bytes."""
        return self.listed_bytes + (0 if self.reloadable else self.tensor_bytes)

    @property
    def modified(self) -> float:
        """When the file was written or, without one, when the version was made (Unix time)."""
        return self._made if self._source is None else self._source.modified_ns / 1e9

    def edits(self) -> tuple[CanonicalEdit, ...]:
        """The edits in canonical form, in the order in which they apply.

        The first call reads the file. Raises `Unavailable` where its data is broken, cannot be
        read or has changed since it was listed, and `NotFound` where a folder's file is gone.
        """
        with self._loading:
            if self._edits is None:
                edits = self._load()
                self._tensor_bytes = memory_of(edits)
                self._edits = edits
            return self._edits

    def open(self) -> BinaryIO:
        """Open the version's file, verified, at its start; the caller closes it.

        Raises what `edits` raises.
        """
        if self._source is None:
            raise self._unavailable("It was not made from a file that is kept.")
        with self._reading():
            file, header = open_verified(self._source.fetch(), self._source.size)
        if header.digest != self.digest:
            file.close()
            raise self._unavailable("Its file has changed since it was listed.")
        return file

    def moved(self, file: File) -> None:
        """Read from another file with the same content from now on."""
        self._source, self.only_copy = file, False

    def replaceable(self) -> bool:
        """Whether the tensors could be read again from the file they came from, unchanged."""
        return self._source is not None and self._source.intact()

    def evict(self) -> bool:
        """Drop the tensors, unless they are being read just now; return whether it was done."""
        if not self._loading.acquire(blocking=False):
            return False
        self._edits = None
        self._loading.release()
        return True

    @releasing_workers
    def _load(self) -> tuple[CanonicalEdit, ...]:
        # Known from an earlier try: the file must change first, or be put back.
        if self.problem is not None and self.problem != _GONE:
            raise self._unavailable(self.problem)
        assert self._source is not None
        with self._reading():
            data = read(self._source.fetch(), self._source.size)
        try:
            header = header_of(data)
            if header.digest == self.digest:
                edits = edits_of(header, data)
                self.problem = None
                return edits
            reason = "Its file has changed since it was listed."
        except InvalidFile as error:
            reason = self.problem = error.message
        raise self._unavailable(reason)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise what the disk refuses in the block as `NotFound` or `Unavailable`."""
        try:
            yield
        except FileNotFoundError as error:
            if self.origin == "folder":
                raise NotFound(
                    f"The file of the intervention `{self.name}` cannot be read any more"
                    f" ({error.strerror})."
                ) from None
            self.problem = _GONE
            raise self._unavailable(_GONE) from None
        except OSError as error:
            raise self._unavailable(f"Its file cannot be read ({error.strerror}).") from error
        except InvalidFile as error:
            raise self._unavailable(error.message) from None

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(f"The intervention `{self.name}` cannot be used now: {reason}")

    def __repr__(self) -> str:
        return f"<Version {self.name}@{self.digest[:12]} ({self.origin})>"
