"""Who sends a request: what of it is its sender's, not its content's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from reft_runtime.errors import InvalidRequest


def everything(name: str) -> bool:
    """Sees every name."""
    return True


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of requests, as the engine knows it.

    `tenant` is whose requests share one turn in the engine's queue, and `weight` how large that
    share is beside others'. Requests of different `salt` share nothing in the prefix cache. A name
    that the caller does not see (`sees`) is unknown to it. An answer for which no length was asked
    has at most `max_tokens`.
    """

    tenant: str = ""
    weight: float = 1.0
    salt: bytes = b""
    sees: Callable[[str], bool] = everything
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Real) or not 0 < self.weight < math.inf:
            raise InvalidRequest(
                f"weight must be a finite number above 0, not {repr(self.weight)[:40]}.",
                param="weight",
            )
        if not isinstance(self.salt, bytes):
            raise InvalidRequest(
                f"salt must be bytes, not {type(self.salt).__name__}.", param="salt"
            )


ANYONE = Caller()
"""The caller where callers are not told apart."""
