"""Keeps from standard error what libraries say at every start and nobody can act on.

transformers imports torchao wherever it is installed, for plain models too. torchao then tells of
its kernels for devices that this machine does not have, and torch of how torchao registers types.
For recurrent layers transformers recommends packages that have kernels for GPUs only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_AT_IMPORT = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass ",
}
_ON_CPU = {
    "transformers.integrations.hub_kernels": " is falling back to its reference PyTorch",
}
"""A part of those messages, before their arguments are put in, by the logger that tells them."""


def hide_import_messages() -> None:
    """Hide what is told at imports, and no other messages of the same loggers."""
    _hide(_AT_IMPORT)


@contextmanager
def import_messages_hidden() -> Iterator[None]:
    """Hide the same within the context alone, for a process that belongs to somebody else."""
    added = _hide(_AT_IMPORT)
    try:
        yield
    finally:
        for name, hides in added.items():
            logging.getLogger(name).removeFilter(hides)


def hide_messages_on_cpu() -> None:
    """Hide what is of no use for a model on a CPU."""
    _hide(_ON_CPU)


def _hide(parts: dict[str, str]) -> dict[str, _Without]:
    added = {name: _Without(part) for name, part in parts.items()}
    for name, hides in added.items():
        logging.getLogger(name).addFilter(hides)
    return added


class _Without(logging.Filter):
    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def filter(self, record: logging.LogRecord) -> bool:
        return self._part not in str(record.msg)
