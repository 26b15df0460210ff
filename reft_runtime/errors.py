"""Every exception of the project, in one tree, and what their messages suggest.

ReftError
├── InvalidRequest          a value of a request is not usable (HTTP 400)
│   └── ContextLengthExceeded  ... its prompt and answer are longer than the model takes (400)
├── NotFound                no such model, intervention or version (404)
│   └── UnknownName         ... nothing has this name (404)
├── InvalidFile             an intervention file is broken (400)
│   └── FileTooLarge        ... or larger than the limit (413)
├── WrongBaseModel          a sound file, made for another base model (409)
├── Changed                 a name does not stand for what its asker expected (412)
├── Overloaded              the queue is full; try again later (503)
│   ├── Draining            the server is shutting down (503)
│   └── OutOfMemory         memory ran out while it was answered (503)
├── Unavailable             a stored file or the state folder cannot be used just now (503)
├── StoreFull               there is no room left for another upload (507)
├── RequestFailed           a fault inside one request ended it (500)
├── EngineDead              the engine stopped and serves nothing any more (500)
├── TrainingFailed          a training ended before its time
├── UnsupportedModel        the engine refuses to load this base model
└── ConfigError             a setting is not usable; raised at start
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MOST_COMPARED = 1000
"""At most this many names are compared letter by letter, which takes some milliseconds."""

MOST_SEEN = 100_000

LENGTHS = 3
"""A name that was meant may be longer or shorter by this many letters."""

LIKE = 0.7
"""Least similarity of two names, from 0 to 1 (`difflib.SequenceMatcher.ratio`)."""


class ReftError(Exception):
    """Root of all errors raised on purpose; `param` names the field at fault, if there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ReftError):
    """A value of a request is not usable; the message names the field and the fix."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model takes."""


class NotFound(ReftError):
    """No model, intervention or version of that name."""


class UnknownName(NotFound):
    """No intervention has this name; `meant` is a question after the message, or empty."""

    def __init__(self, name: str, meant: str = "") -> None:
        super().__init__(f"The intervention `{name}` does not exist.{meant}", param="name")


class InvalidFile(ReftError):
    """An intervention file is broken; the message says what and where."""


class FileTooLarge(InvalidFile):
    """An intervention file is larger than the configured limit."""


class WrongBaseModel(ReftError):
    """A sound intervention file that was made for another base model."""


class Changed(ReftError):
    """A name does not stand for the version that a change expected; nothing was changed."""

    @classmethod
    def missing(cls, name: str) -> Changed:
        """The error for a version that was expected under a name that stands for nothing."""
        return cls(f"There is no intervention `{name}`, which was to be there.", param="name")


class Overloaded(ReftError):
    """The queue is full. `retry_after` is a hint in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Overloaded):
    """The server is shutting down and takes no new request."""


class OutOfMemory(Overloaded):
    """Memory ran out while this request, the newest at work, was answered; no other ended."""


class Unavailable(ReftError):
    """A stored file, or the state folder, cannot be used just now; the request itself is sound."""


class StoreFull(ReftError):
    """There is no room for another upload; the message says which limit is reached."""


class RequestFailed(ReftError):
    """A fault inside one request (such as non-finite logits) ended it, and no other."""


class EngineDead(ReftError):
    """The engine stopped; every waiting request gets this, and no new one is taken."""


class TrainingFailed(ReftError):
    """A training ended before its time; the message says why, and what was kept."""


class UnsupportedModel(ReftError):
    """The engine refuses to load this base model; the message says why."""


class ConfigError(ReftError):
    """A setting is not usable; raised at start."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Up to `most` of the known names that are like this one, the most similar first.

    Of very many names only some are compared, so that an error costs no more than an answer.
    """
    seen = islice(known, MOST_SEEN)
    near = islice((k for k in seen if abs(len(k) - len(name)) <= LENGTHS), MOST_COMPARED)
    return get_close_matches(name, near, most, LIKE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to append to an error, beginning with a space; empty if no name is similar."""
    found = [f"`{like}`" for like in nearest(name, known)]
    if not found:
        return ""
    *others, last = found
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
