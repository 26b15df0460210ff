"""Reads JSON that clients send by the letter of its standard: headers of files, and bodies.

What another program wrote for itself (a checkpoint's settings, the rows of a data set, a hub's
index) is read as Python's `json` does it: a few fields of it are used, each is checked, and NaN in
another one is no reason to refuse the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any


class RepeatedKey(ValueError):
    """`key` occurs twice in one object, and readers differ in which of the two they take."""

    def __init__(self, key: str) -> None:
        super().__init__(f"a key occurs twice in one object: {key[:80]!r}")
        self.key = key


def load_strict(
    text: bytes | str,
    *,
    max_keys: int | None = None,
    parse_int: Callable[[str], int] = int,
    parse_float: Callable[[str], float] = float,
) -> Any:
    """The value that a JSON text, in UTF-8, stands for.

    Raises `ValueError`, which says what is wrong: broken JSON, a key that occurs twice in one
    object (`RepeatedKey`), an object of more than `max_keys`, NaN and Infinity, half of a surrogate
    pair, and nesting deeper than the interpreter can follow.
    """
    if isinstance(text, bytes):
        text = text.decode()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if max_keys is not None and len(pairs) > max_keys:
            raise ValueError(f"an object has more than {max_keys} keys")
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise RepeatedKey(counts.most_common(1)[0][0])
        return fields

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=_no_constant,
            parse_int=parse_int,
            parse_float=parse_float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        # An escaped surrogate without its other half is no character: nothing can encode it.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
