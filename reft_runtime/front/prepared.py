"""A request between its check and its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reft_runtime.front.prompt_form import PromptForm
from reft_runtime.schedule.request import Request


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was checked completely, and holds the versions that it applies.

    Its owner starts it (`Engine.start`), or lets go of the versions with `release`. `versions` are
    written `NAME@DIGEST`, in the order in which they apply; `form` is how its prompt was written.
    `labels` are those of a classification, as the caller or the file wrote them.
    """

    request: Request
    versions: tuple[str, ...]
    form: PromptForm
    release: Callable[[], None]
    """Lets go of the versions; does nothing when it is called again."""
    labels: tuple[str, ...] = ()


def release_all(prepared: Iterable[Prepared]) -> None:
    """Let go of the versions that these requests hold; for requests that are not started."""
    for one in prepared:
        one.release()
