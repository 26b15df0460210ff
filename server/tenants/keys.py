"""Whose key is whose: the owner's, and those of the keys file, which is followed as it changes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from reft_runtime.errors import ConfigError
from server.settings import Settings
from server.tenants.keys_file import HASH, read_keys_file
from server.tenants.tenant import OWNER, Tenant

LOOK_SECONDS = 1.0
"""Pause between two looks at the keys file."""

PROBLEM = "The keys file cannot be used as it is now; the keys from before count."
"""What is told to anybody of a keys file that is not usable."""

logger = logging.getLogger("reft.server")


def new_key() -> tuple[str, str]:
    """A new random key, and its hash as the keys file has it."""
    key = f"reft-{secrets.token_urlsafe(32)}"
    return key, HASH + digest_of(key.encode()).hex()


def digest_of(key: bytes) -> bytes:
    """SHA-256 of a key: what is kept of it, and compared."""
    return hashlib.sha256(key).digest()


class Keys:
    """The tenants by their keys.

    `owner_key` is the key of `OWNER`, and `file` the keys file; None if there is none. Raises
    `ConfigError` for a file that is not usable. Later the file may be wrong for a while: then the
    tenants stay as they are, and `problem` says so.
    """

    def __init__(self, owner_key: str | None, file: Path | None) -> None:
        self._owner = None if owner_key is None else digest_of(owner_key.encode())
        self._file = file
        self._taken = self._seen = self._look()
        self._tenants = self._read()
        self.problem: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> Keys:
        """The keys that the settings ask for."""
        secret = settings.api_key
        return cls(None if secret is None else secret.get_secret_value(), settings.keys)

    @property
    def configured(self) -> bool:
        """Whether a key is needed at all."""
        return self._owner is not None or self._file is not None

    def tenant_of(self, key: bytes) -> Tenant | None:
        """The tenant of a key; None if nobody has it.

        The key's digest is compared with all others in constant time, so that the time taken tells
        nothing of any key.
        """
        shown, found = digest_of(key), None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, shown):
                found = tenant
        return found

    async def follow(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Look at the file every `LOOK_SECONDS`, by `in_thread`, until cancelled."""
        while self._file is not None:
            await asyncio.sleep(LOOK_SECONDS)
            await in_thread(self.refresh)

    def refresh(self) -> None:
        """Take the file as it is now, if it has changed and was the same at the last look.

        So a file that is being written is not taken by half. Requests under way keep the tenant
        that they began with.
        """
        before, self._seen = self._seen, self._look()
        if self._seen == self._taken or self._seen != before:
            return
        self._taken = self._seen
        try:
            self._tenants = self._read()
        except ConfigError as error:
            self.problem = PROBLEM
            logger.error("The keys file is not usable, and the keys stay as they are: %s", error)
            return
        self.problem = None
        logger.info("The keys file has changed: %d keys are known", len(self._tenants))

    def _look(self) -> tuple[int, ...] | None:
        """What tells one state of the file from another; None if it cannot be seen.

        The time of the last change to its entry is a part of it: the time of writing can be kept,
        and another mode makes a file readable.
        """
        if self._file is None:
            return None
        try:
            status = os.stat(self._file)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino

    def _read(self) -> tuple[tuple[bytes, Tenant], ...]:
        tenants = {} if self._file is None else read_keys_file(self._file)
        if self._owner is not None:
            if self._owner in tenants:
                raise ConfigError(
                    f"{self._file}: the key of --api-key is a key of"
                    f" `{tenants[self._owner].name}`, too; give the tenant one of its own."
                )
            tenants[self._owner] = OWNER
        return tuple(tenants.items())
