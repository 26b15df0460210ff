"""How far long work has come: a bar in a terminal or a notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as plain
from tqdm.auto import tqdm

LINE_SECONDS = 30.0
"""Files and pipes get a line after so many seconds; what takes less time tells them nothing."""

_LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm, with its `options`; where there is no room for a bar it writes lines."""
    if _shows_bars():
        return tqdm(iterable, **options)
    lines = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "delay": LINE_SECONDS}
    return plain(iterable, **options | lines, file=_Lines(), position=0, bar_format=_LINE)


def _shows_bars() -> bool:
    """Whether what is written over a line again and again can be read there."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None and "IPKernelApp" in shell.config:
        return True
    return sys.stderr is not None and sys.stderr.isatty()


class _Lines:
    """A file for tqdm: what it writes over its bar becomes a line of standard error."""

    def write(self, text: str) -> None:
        if (line := text.strip()) and sys.stderr is not None:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()
