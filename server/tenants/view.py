"""The registry as one tenant sees it: what its patterns do not match is as if it were unknown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from reft_runtime.errors import Changed, InvalidRequest, NotFound, ReftError, UnknownName
from reft_runtime.interventions.format.identity import SUFFIX
from reft_runtime.interventions.registry.sources import NO_FILE
from server.errors import ApiError, api_error
from server.tenants.access import check_change
from server.tenants.audit import audit_change, audit_refusal
from server.tenants.tenant import Tenant

if TYPE_CHECKING:
    from reft_runtime.interventions import Entry, Version
    from reft_runtime.interventions.registry.entry import (
        Change,
        Page,
        SourceState,
        Tier,
        VersionEntry,
    )
    from reft_runtime.interventions.registry.incoming import Incoming
    from reft_runtime.interventions.registry.paging import Sort
    from server.engine import Registry


USERS_SHARE = 0.5
"""Part of the memory of interventions up to which users may pin: what others use has the rest."""


class View:
    """What a handler gets of the registry: all of it goes by what `tenant` sees and may change.

    The methods are those of `server.engine.Registry`, and raise what they raise. A name that the
    tenant does not see raises the error of an unknown one, whether or not there is such a name. A
    change that the tenant may not make raises `ApiError` (403). Every change, also a refused one,
    is a line of the audit, with the id of the request. `in_cluster` says that other servers serve
    the same: changes that only this one would know of raise `InvalidRequest`.
    """

    def __init__(
        self, registry: Registry, tenant: Tenant, request_id: str, *, in_cluster: bool = False
    ) -> None:
        self._registry = registry
        self._in_cluster = in_cluster
        self._tenant = tenant
        self._request_id = request_id
        self._share = 1.0 if tenant.role == "admin" else USERS_SHARE

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@DIGEST` stands for now; raises `NotFound`."""
        if not self._tenant.sees(ref.partition("@")[0]):
            raise NotFound(f"The model `{ref}` does not exist.", param="model")
        return self._registry.resolve(ref)

    def meant(self, ref: str) -> str:
        """Question after the error for an unknown name: which name was meant; may be empty."""
        return self._registry.meant(ref, self._tenant.sees)

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended to the counts of a name."""
        self._registry.count(name, prompt_tokens, generation_tokens)

    def entry(self, name: str) -> Entry:
        """The listing's entry for one name; raises `UnknownName`."""
        with self._seen(name):
            return self._registry.entry(name)

    def pages(self) -> Iterator[list[Entry]]:
        """The listing in parts, sorted by name."""
        return self._registry.pages(self._tenant.sees)

    def page(self, q: str, sort: Sort, after: str | None, limit: int) -> Page:
        """The first `limit` entries that match `q`, after the place where another page ended."""
        return self._registry.page(q, sort, after, limit, self._tenant.sees)

    def versions_of(self, name: str) -> Sequence[VersionEntry]:
        """The versions of a name that requests can use, the current one first."""
        with self._seen(name):
            return self._registry.versions_of(name)

    def unserved(self) -> Mapping[str, str]:
        """Reasons why files are not served, by path, or by name for uploads; told to admins only.

        An admin that does not see everything is told of files whose names it sees.
        """
        if self._tenant.role != "admin":
            return {}
        found = self._registry.unserved()
        if self._tenant.sees_all:
            return found
        return {file: why for file, why in found.items() if self._tenant.sees(_name_of(file))}

    def sources(self) -> Sequence[SourceState]:
        """The sources of interventions, and what is wrong with those that cannot be read."""
        return self._registry.sources()

    def state_problem(self) -> str | None:
        """Why the state cannot be used; None while it can."""
        return self._registry.state_problem()

    def tiers(self) -> Mapping[Tier, int]:
        """Number of all interventions by the place of their tensors."""
        return self._registry.tiers()

    def held_bytes(self) -> int:
        """Memory that all interventions take now, in bytes."""
        return self._registry.held_bytes()

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """A version and its open file, which the caller closes; raises `NotFound`."""
        with self._seen(ref.partition("@")[0]):
            return self._registry.open(ref)

    def incoming(self) -> Incoming:
        """A temporary file for an upload, which `put` takes."""
        return self._registry.incoming()

    def put(
        self, name: str, data: Incoming, sha256: str | None, expected: Collection[str] | None
    ) -> Change:
        """Upload a file under a name."""
        put = partial(self._registry.put, name, data, sha256, expected, share=self._share)
        return self._audited("put", name, put)

    def load(self, name: str, path: str, *, replace: bool) -> Change:
        """Serve a file of the source folders under a name.

        A file whose name the tenant does not see is as if it were not there.
        """

        def load() -> Change:
            if self._in_cluster:
                raise InvalidRequest(
                    "In a cluster no file of a source is loaded under another name, as only one of"
                    " its servers would serve it: upload the file, by PUT /v1/interventions/NAME.",
                    param="path",
                )
            if not self._tenant.sees(_name_of(path)):
                raise NotFound(NO_FILE, param="path")
            return self._registry.load(name, path, replace=replace)

        return self._audited("load", name, load)

    def rollback(self, name: str, digest: str | None, expected: Collection[str] | None) -> Change:
        """Serve a kept version of an upload again."""
        back = partial(self._registry.rollback, name, digest, expected, share=self._share)
        return self._audited("rollback", name, back, self._seen(name, expected))

    def pin(self, name: str) -> Change:
        """Keep the tensors of a name in memory."""
        pin = partial(self._registry.pin, name, share=self._share)
        return self._audited("pin", name, pin, self._seen(name))

    def unpin(self, name: str) -> Change:
        """Let the tensors of a name be evicted."""
        return self._audited("unpin", name, partial(self._registry.unpin, name), self._seen(name))

    def warm(self, name: str) -> Entry:
        """Read the tensors of a name; returns its entry."""
        with self._seen(name):
            check_change(self._tenant, name)
            return self._registry.warm(name)

    def waiting(self) -> int:
        """Number of all requests that wait for memory."""
        return self._registry.waiting()

    def remove(self, name: str, expected: Collection[str] | None = None) -> Change:
        """Stop serving what a name stands for."""
        remove = partial(self._registry.remove, name, expected, uploads_only=self._in_cluster)
        return self._audited("delete", name, remove, self._seen(name, expected))

    @contextmanager
    def _seen(self, name: str, expected: Collection[str] | None = None) -> Iterator[None]:
        """Use a name in the block, if the tenant sees it; the error for an unknown one otherwise.

        `expected` are the digests of which it was to stand for one.
        """
        if not self._tenant.sees(name):
            raise Changed.missing(name) if expected else UnknownName(name, self.meant(name))
        try:
            yield
        except UnknownName:  # its question may name what the tenant does not see
            raise UnknownName(name, self.meant(name)) from None

    def _audited(
        self,
        action: str,
        name: str,
        change: Callable[[], Change],
        seen: AbstractContextManager[None] | None = None,
    ) -> Change:
        """Make a change, if the tenant may; a name that must be there is `seen` meanwhile."""
        try:
            with seen or nullcontext():
                check_change(self._tenant, name)
                if self._in_cluster and not self._registry.shares_state:
                    raise InvalidRequest(_NOTHING_SHARED)
                made = change()
        except (ApiError, ReftError) as error:
            status = api_error(error, self._request_id).status
            audit_refusal(self._request_id, self._tenant, action, name, status)
            raise
        audit_change(self._request_id, self._tenant, action, name, made)
        return made


_NOTHING_SHARED = (
    "The servers of this cluster share no state, so what they serve comes from the sources alone."
    " Put the file there, or start the servers with --state-dir at a URL, or with --shared-state in"
    " a folder that all have mounted."
)


def _name_of(path: str) -> str:
    """The name that a file's path stands for."""
    return PurePosixPath(path).name.removesuffix(SUFFIX)
