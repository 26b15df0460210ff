"""Reads values that are like JSON, or like Python's, as models write them within calls."""

from __future__ import annotations

import json
import re

from server.tools.syntax import bare_value, joined, quoted

_BLANKS = re.compile(r"\s*")
_IN_QUOTES = re.compile(r"""\\(.)|\"""", re.DOTALL)


class Values:
    """Reads values of a text from `at` on; what it reads comes as JSON.

    Raises `ValueError` for what is none. A text stands between two `mark`, or in quotes of JSON or
    Python, as `QUOTES` matches it; any other value is what `BARE` matches. In an object a name that
    is no text is matched by `KEY`, with what parts it from its value.
    """

    QUOTES = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')(?=\s*[,:\]}])""", re.DOTALL)
    BARE = re.compile(r"[^,{}\[\]<]+")
    KEY = re.compile(r"\s*([^:,{}\[\]<]*[^:,{}\[\]<\s])\s*:")

    def __init__(self, text: str, at: int = 0, *, mark: str | None = None) -> None:
        self._text = text
        self.at = at
        self._mark = mark

    def value(self) -> str:
        """Read a value."""
        if self._mark and self.takes(self._mark):
            return self._marked(self._mark)
        if self.takes("{"):
            return self.fields("}", ":")
        if self.takes("["):
            items: list[str] = []
            while not self.takes("]"):
                items.append(self.value())
                self._separator("]")
            return f"[{', '.join(items)}]"
        if said := self.QUOTES.match(self._text, self.at):
            return self._quoted(said)
        return bare_value(self.match(self.BARE)[0].strip())

    def fields(self, end: str, sign: str) -> str:
        """Read names and values with `sign` between them, up to `end`."""
        fields: dict[str, str] = {}
        while not self.takes(end):
            key = self._key(sign)
            fields[key] = self.value()
            self._separator(end)
        return joined(fields)

    def takes(self, text: str) -> bool:
        """Go behind blanks, and behind a text if that stands there; return whether it does."""
        self.match(_BLANKS)
        found = self._text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Go behind what a pattern matches."""
        found = pattern.match(self._text, self.at)
        if found is None:
            raise ValueError("no value")
        self.at = found.end()
        return found

    def _key(self, sign: str) -> str:
        said: str | None = None
        if self._mark and self.takes(self._mark):
            said = self._marked(self._mark)
        elif found := self.QUOTES.match(self._text, self.at):
            said = self._quoted(found)
        if said is None:
            return self.match(self.KEY)[1]
        if not self.takes(sign):
            raise ValueError("no value behind a key")
        key: str = json.loads(said)
        return key

    def _marked(self, mark: str) -> str:
        end = self._text.index(mark, self.at)
        said, self.at = self._text[self.at : end], end + len(mark)
        return quoted(said)

    def _quoted(self, found: re.Match[str]) -> str:
        self.at = found.end()
        return _unquoted(found[1])

    def _separator(self, end: str) -> None:
        if not self.takes(",") and not self._text.startswith(end, self.at):
            raise ValueError("no separator")


def _unquoted(said: str) -> str:
    """A text in quotes of JSON or Python as JSON; as it is where its escapes are no JSON's."""
    inner = said[1:-1]
    escaped = _IN_QUOTES.sub(lambda one: {"'": "'", None: '\\"'}.get(one[1], one[0]), inner)
    try:
        return quoted(json.loads(f'"{escaped}"', strict=False))
    except ValueError:
        return quoted(inner)
