"""The limits of an engine, checked before a model is loaded for them."""

from __future__ import annotations

from numbers import Integral

from reft_runtime.errors import ConfigError


def check_limits(**limits: int | None) -> None:
    """Raise `ConfigError` unless each is a whole number of at least 1, or None for the default."""
    for name, limit in limits.items():
        if limit is None:
            continue
        if not isinstance(limit, Integral):
            raise ConfigError(f"{name} must be a whole number, not {limit!r}.", param=name)
        if limit < 1:
            raise ConfigError(f"{name} must be at least 1, not {limit}.", param=name)
