"""How a request names the interventions to apply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.identity import SUFFIX

if TYPE_CHECKING:
    from reft_runtime.interventions import Version

MAX_INTERVENTIONS = 16
"""Most interventions that one request may compose."""

MAX_STRENGTH = 100.0
"""A server takes strengths from minus this number to this number."""


def with_strength(name: str, strength: float) -> str:
    """A name with `=STRENGTH` appended unless the strength is 1, as `Use.parse` reads it."""
    return name if strength == 1 else f"{name}={repr(float(strength)).removesuffix('.0')}"


@dataclass(frozen=True, slots=True)
class Use:
    """One intervention of a request: `NAME`, `NAME@DIGEST`, or a version resolved before.

    `strength` scales the edit: 1 is as trained, 0 the base model exactly, and it may be negative.
    `subspace` lists the directions (columns of R) that are edited, None edits along all.
    """

    intervention: str | Version
    strength: float = 1.0
    subspace: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.intervention, str) and not hasattr(self.intervention, "digest"):
            raise InvalidRequest(
                "intervention: give a name, or a version that was resolved before, not "
                f"{repr(self.intervention)[:40]}.",
                param="intervention",
            )
        try:
            finite = isinstance(self.strength, int | float) and math.isfinite(self.strength)
        except OverflowError:  # a whole number that no float can hold
            finite = False
        if not finite:
            raise InvalidRequest(
                f"strength must be a finite number, not {repr(self.strength)[:40]}.",
                param="strength",
            )
        if self.subspace is not None:
            if not isinstance(self.subspace, Iterable) or any(
                type(direction) is not int for direction in self.subspace
            ):
                raise InvalidRequest(
                    "subspace: name directions by their numbers, such as [0, 2].", param="subspace"
                )
            object.__setattr__(self, "subspace", tuple(self.subspace))

    @classmethod
    def parse(cls, text: str) -> Use:
        """Read a command's option: `NAME`, `NAME@DIGEST` or a file's path, then `=STRENGTH`.

        Without a strength it is 1. Raises `InvalidRequest`.
        """
        name, equals, strength = text.rpartition("=")
        if not equals or text.endswith(SUFFIX):  # "=" may be a part of a file's name
            return cls(text)
        try:
            return cls(name, float(strength))
        except (ValueError, InvalidRequest):
            raise InvalidRequest(
                f"intervention: {text!r}: what is behind = must be a finite number, the strength,"
                f" such as {name}=0.5.",
                param="intervention",
            ) from None

    @property
    def label(self) -> str:
        """The name as it was given."""
        given = self.intervention
        return given if isinstance(given, str) else f"{given.name}@{given.digest}"
