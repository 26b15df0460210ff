"""Makes versions of the files that fit one base model."""

from __future__ import annotations

from collections.abc import Callable

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.file import edits_of
from reft_runtime.interventions.format.header import header_of
from reft_runtime.interventions.format.manifest import BaseShape, Manifest, check_base
from reft_runtime.interventions.registry.sources import NAME, NAME_RULE, File
from reft_runtime.interventions.registry.version import Origin, Version
from reft_runtime.machine.cores import releasing_workers


class Verifier:
    """Checks names and files against one base model; the parameters are those of `Registry`."""

    def __init__(
        self,
        base: BaseShape,
        check_site: Callable[[int, str, int], None] | None,
        allow_base: str | None,
        max_file_bytes: int,
    ) -> None:
        self.base = base
        self.max_file_bytes = max_file_bytes
        self._check_site = check_site
        self._allow_base = allow_base
        self._mark = object()  # in the versions that it makes, which may outlive it

    def check_name(self, name: str) -> None:
        """Raise `InvalidRequest` for a name that nothing can have."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"The name {name[:80]!r} is not allowed: {NAME_RULE}.", param="name"
            )
        if name == self.base.model:
            raise InvalidRequest(
                f"The name `{name}` is the base model's own id; choose another.", param="name"
            )

    @releasing_workers
    def verified(self, name: str, data: bytes, origin: Origin) -> Version:
        """A version made of a whole file, its tensors read. See `Registry.verified`."""
        header = header_of(data)
        self._check(header.manifest)
        return self._made(Version(name, header, origin, None, edits_of(header, data)))

    def listed(self, name: str, file: File, origin: Origin) -> Version:
        """A version made of a file's header; its tensors are read when they are needed.

        Raises `InvalidFile`, `FileTooLarge`, `WrongBaseModel`, and `OSError` for a file that cannot
        be read.
        """
        header = file.header(self.max_file_bytes)
        self._check(header.manifest)
        return self._made(Version(name, header, origin, file))

    def made(self, version: Version) -> bool:
        """Whether the version was checked here, and not against another base model."""
        return version.made_by is self._mark

    def _made(self, version: Version) -> Version:
        version.made_by = self._mark
        return version

    def _check(self, manifest: Manifest) -> None:
        check_base(manifest, self.base, self._allow_base)
        if self._check_site is not None:
            for index, edit in enumerate(manifest.edits):
                self._check_site(edit.layer, edit.component, manifest.width_of(index))
