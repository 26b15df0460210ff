"""The versions that a request's uses stand for: what its caller may see, found and held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from reft_runtime.caller import Caller
from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.schedule.request import AppliedIntervention
from reft_runtime.use import MAX_INTERVENTIONS, Use

if TYPE_CHECKING:
    from reft_runtime.interventions import Version
    from reft_runtime.interventions.registry.holding import Holding


class Versions(Protocol):
    """The part of the registry that requests need."""

    def resolve(self, ref: str) -> Version:
        """The version that a name stands for now; raises `NotFound`."""

    def acquire(self, refs: Sequence[str | Version]) -> Holding:
        """Begin to hold the versions that names stand for now, all together; never blocks long."""

    def hold(self, version: Version) -> None:
        """Begin a request on a version that is held: hold it once more, and count the request."""

    def release(self, version: Version) -> None:
        """Let go of a version that is held."""

    def meant(self, ref: str, sees: Callable[[str], bool]) -> str:
        """A question to append to the error for an unknown name; may be empty."""


class Resolver:
    """Finds and holds the versions of requests.

    Names that are unknown, or that the caller does not see, raise `NotFound`, whose `param` is
    `interventions.POSITION.name`; versions that cannot be read raise `Unavailable`.
    """

    def __init__(self, versions: Versions) -> None:
        self._versions = versions

    def resolved(self, uses: Sequence[Use], caller: Caller) -> list[Version]:
        """The versions of `uses`, in order; they are not held, and no tensors are read."""
        refs = self._seen(uses, caller)
        with self._naming(refs, caller):
            return [self._versions.resolve(ref) if isinstance(ref, str) else ref for ref in refs]

    def acquire(self, uses: Sequence[Use], caller: Caller) -> Holding:
        """Begin to hold the versions of `uses`, in order; see `Admission.acquire`."""
        refs = self._seen(uses, caller)
        with self._naming(refs, caller):
            return self._versions.acquire(refs)

    @contextmanager
    def held(
        self, uses: Sequence[Use], caller: Caller, holding: Holding | None
    ) -> Iterator[Sequence[Version]]:
        """Yield the versions that are used, in order, with their tensors in memory.

        Those that nobody has acquired yet are held for the length of the block.
        """
        own = self.acquire(uses, caller) if holding is None else holding
        try:
            with self._naming([use.intervention for use in uses], caller):
                own.ready.result()
            yield own.versions
        finally:
            if holding is None:
                own.release()

    def hold(self, versions: Sequence[Version]) -> Callable[[], None]:
        """Hold versions once more, for a request; returns what lets go of them, once."""
        with ExitStack() as held:
            for version in versions:
                self._versions.hold(version)
                held.callback(self._versions.release, version)
            return held.pop_all().close

    def _seen(self, uses: Sequence[Use], caller: Caller) -> list[str | Version]:
        """What `uses` name, if these are not too many and the caller sees them all."""
        if len(uses) > MAX_INTERVENTIONS:
            raise InvalidRequest(
                f"interventions: at most {MAX_INTERVENTIONS} in one request.",
                param="interventions",
            )
        refs = [use.intervention for use in uses]
        for position, ref in enumerate(refs):
            if isinstance(ref, str) and not caller.sees(ref.partition("@")[0]):
                raise self._unknown(position, ref, caller)
        return refs

    @contextmanager
    def _naming(self, refs: Sequence[str | Version], caller: Caller) -> Iterator[None]:
        """If the block does not find one of the names, say which, and what may be meant."""
        try:
            yield
        except NotFound:
            for position, ref in enumerate(refs):
                if isinstance(ref, str):
                    try:
                        self._versions.resolve(ref)
                    except NotFound:
                        raise self._unknown(position, ref, caller) from None
            raise

    def _unknown(self, position: int, ref: str, caller: Caller) -> NotFound:
        return NotFound(
            f"The intervention `{ref}` does not exist.{self._versions.meant(ref, caller.sees)}",
            param=f"interventions.{position}.name",
        )


def applied(versions: Sequence[Version], uses: Sequence[Use]) -> tuple[AppliedIntervention, ...]:
    """What `uses` do with their versions, in order. Raises what `Version.edits` raises.

    A subspace that an edit has not raises `InvalidRequest`, whose `param` is
    `interventions.POSITION.subspace`.
    """
    return tuple(map(_applied, range(len(uses)), versions, uses))


def _applied(position: int, version: Version, use: Use) -> AppliedIntervention:
    edits = version.edits()
    if use.subspace is not None:
        try:
            edits = tuple(edit.subset(use.subspace) for edit in edits)
        except InvalidRequest as error:
            error.param = f"interventions.{position}.subspace"
            raise
    return AppliedIntervention(version.digest, edits, use.strength, use.subspace)
