"""Finds the end of a JSON object in a text that comes in pieces."""

from __future__ import annotations

import re

_MARK = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class JsonEnd:
    """Looks for the end of one object by its braces and strings; it does not check the rest."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Take the next piece; return where in it the object ends, None if it goes on."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._string else _MARK).search(text, at)
            if found is None:
                return None
            at = found.end()
            match found[0]:
                case '"':
                    self._string = not self._string
                case "\\":
                    self._escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None
