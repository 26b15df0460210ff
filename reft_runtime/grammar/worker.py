"""Tries grammars in a process of its own: `python -m reft_runtime.grammar.worker`.

Lines of JSON come in, and for each one goes out. The first is the tokenizer: its definition,
vocabulary size and end tokens. Each of the others is a grammar: its kind, source and frame. The
answer has its `fault`, empty for one that compiles and allows a first token, and the `place` of it.

A grammar of forty bytes can take minutes, gigabytes, or more stack than there is. Here it takes the
process with it, and whoever asked sees that it has ended.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from typing import Any

from llguidance import LLTokenizer

from reft_runtime.grammar.place import place_of
from reft_runtime.grammar.source import STACK_BYTES, fault_of, matcher_of, read_tokenizer
from reft_runtime.sampling import Grammar

CPU_SECONDS = 1
"""Seconds of processor time that one grammar may take; the system counts whole ones, rounded up."""

MEMORY_BYTES = 2**30
"""Memory that it may take."""


def tried(tokenizer: LLTokenizer, grammar: Grammar) -> dict[str, str]:
    """What is wrong with a grammar, and where."""
    try:
        matcher = matcher_of(tokenizer, grammar)
    except (ValueError, RecursionError) as error:
        return {"fault": f"it cannot be read: {error}", "place": ""}
    if not fault_of(matcher):
        matcher.compute_bitmask()
    fault = fault_of(matcher)
    if not fault or grammar.kind != "json_schema":
        return {"fault": fault, "place": ""}

    def fails(schema: Any) -> bool:
        part = matcher_of(tokenizer, Grammar("json_schema", json.dumps(schema)))
        return bool(fault_of(part))

    return {"fault": fault, "place": place_of(json.loads(grammar.source), fails)}


def _serve() -> None:
    lines = iter(sys.stdin.buffer)
    tokenizer = read_tokenizer(**json.loads(next(lines)))
    _answer({})
    _bound(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES)
    for line in lines:
        _bound(resource.RLIMIT_CPU, int(time.process_time()) + 1 + CPU_SECONDS)
        _answer(tried(tokenizer, Grammar(**json.loads(line))))


def _answer(said: dict[str, str]) -> None:
    print(json.dumps(said), flush=True)


def _bound(what: int, limit: int) -> None:
    hard = resource.getrlimit(what)[1]
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(what, (soft, hard))


def _address_space() -> int:
    """Bytes of address space of this process now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as pages:
            return int(pages.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def main() -> None:
    """Serve until the input ends, in a thread with enough stack."""
    os.nice(3)  # answers under way come first
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
