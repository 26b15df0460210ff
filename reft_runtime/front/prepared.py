"""A request between its check and its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_runtime.front.prompt_form import PromptForm
from reft_runtime.schedule.request import Request

if TYPE_CHECKING:
    from reft_runtime.reasoning import Thinking


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was checked completely, and holds the versions that it applies.

    Its owner starts it (`Engine.start`), or lets go of the versions with `release`. `versions` are
    written `NAME@DIGEST`, in the order in which they apply; `form` is how its prompt was written.
    `labels` are those of a classification, as the caller or the file wrote them. `thinking` is what
    the model may write before the answer to a chat, where the caller tells it from the answer.
    """

    request: Request
    versions: tuple[str, ...]
    form: PromptForm
    release: Callable[[], None]
    """Lets go of the versions; does nothing when it is called again."""
    labels: tuple[str, ...] = ()
    thinking: Thinking | None = None


def release_all(prepared: Iterable[Prepared]) -> None:
    """Let go of the versions that these requests hold; for requests that are not started."""
    for one in prepared:
        one.release()
