"""Keeps from standard error what libraries say at every import and nobody can act on.

transformers imports torchao wherever it is installed, for plain models too. torchao then tells of
its kernels for devices that this machine does not have, and torch of how torchao registers types.
"""

from __future__ import annotations

import logging

_AT_IMPORT = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass ",
}
"""How those messages begin, before their arguments are put in, by the logger that tells them."""


def hide_import_messages() -> None:
    """Hide these messages, and no others of the same loggers, in this process."""
    for name, beginning in _AT_IMPORT.items():
        logging.getLogger(name).addFilter(_Without(beginning))


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginning)
