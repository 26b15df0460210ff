"""One immutable version of a named intervention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from reft_runtime.cores import releasing_workers
from reft_runtime.errors import InvalidFile, NotFound
from reft_runtime.interventions.canonical import CanonicalEdit
from reft_runtime.interventions.file import header_of, parse
from reft_runtime.interventions.header import Header
from reft_runtime.interventions.manifest import Manifest

Origin = Literal["loaded", "uploaded", "folder"]


class Version:
    """What a name stood for when it was resolved: one file's content, and where it came from.

    Only the header is read at first; the tensors are read, verified and converted at the first
    call of `edits`, unless they are given. Made by `Registry`, which also counts `in_flight`, the
    requests that hold it.
    """

    def __init__(
        self,
        name: str,
        header: Header,
        origin: Origin,
        read: Callable[[], bytes],
        edits: tuple[CanonicalEdit, ...] | None = None,
    ) -> None:
        self.name = name
        self.origin = origin
        self.digest = header.digest
        self.manifest: Manifest = header.manifest
        self.size_bytes = header.size_bytes
        self.in_flight = 0
        self._read = read
        self._edits = edits
        self._loading = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether the tensors are in memory."""
        return self._edits is not None

    def edits(self) -> tuple[CanonicalEdit, ...]:
        """The edits in canonical form, in the order in which they apply.

        The first call reads the file. Raises `InvalidFile` where its data is broken or it has
        changed since it was listed, and `NotFound` where it is gone.
        """
        with self._loading:
            if self._edits is None:
                self._edits = self._load()
            return self._edits

    @releasing_workers
    def _load(self) -> tuple[CanonicalEdit, ...]:
        try:
            data = self._read()
        except OSError as error:
            raise NotFound(
                f"The file of the intervention `{self.name}` cannot be read any more"
                f" ({error.strerror})."
            ) from error
        if header_of(data).digest != self.digest:
            raise InvalidFile(
                f"The file of the intervention `{self.name}` has changed since it was listed; try"
                " again in a moment."
            )
        return parse(data).canonical()

    def __repr__(self) -> str:
        return f"<Version {self.name}@{self.digest[:12]} ({self.origin})>"
