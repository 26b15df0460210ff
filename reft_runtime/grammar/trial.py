"""Asks a process of its own whether a grammar can be compiled, and at what cost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from typing import Any, NamedTuple

from reft_runtime.errors import Unavailable
from reft_runtime.grammar.worker import MEMORY_BYTES
from reft_runtime.sampling import Grammar

PATIENCE_SECONDS = 30.0
"""Longest wait for one answer, however busy the machine is."""

FAILED = 1
"""Exit status of a process that ended over an exception, as when memory ends."""


class Refusal(NamedTuple):
    """Why a grammar is refused, and the place in it (`.properties.age`); both may be empty."""

    fault: str
    place: str


class Trial:
    """Tries grammars one after the other in a process, which is started when it is needed.

    One thread uses it. `definition`, `vocab_size` and `eos_ids` are those of `read_tokenizer`.
    """

    def __init__(self, definition: str, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = {
            "definition": definition,
            "vocab_size": vocab_size,
            "eos_ids": sorted(eos_ids),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def of(self, grammar: Grammar) -> Refusal:
        """Try a grammar; a refusal without a fault says that it can be used.

        Raises `Unavailable` if no process can be started, or it ended for another reason.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        said = self._asked({"kind": grammar.kind, "source": grammar.source, "frame": grammar.frame})
        return self._ended() if said is None else Refusal(**said)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self.close()
        command = [sys.executable, "-m", "reft_runtime.grammar.worker"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise Unavailable(f"No process can be started to try the grammar: {error}") from None
        if self._asked(self._tokenizer) is None:
            self.close()
            raise Unavailable("The process that tries grammars has ended; send it again.")

    def _asked(self, question: dict[str, Any]) -> dict[str, str] | None:
        """The answer to a question; None if the process ended over it, or took too long."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(PATIENCE_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            return None
        finally:
            watch.cancel()
        return json.loads(line) if line else None

    def _ended(self) -> Refusal:
        """What it says of a grammar that the process ended over it.

        Raises `Unavailable` if it was ended by somebody, who may have been the wait's end.
        """
        assert self._process is not None
        status = -self._process.wait()
        if status == signal.SIGXCPU:
            return Refusal("to compile it takes more than a second; make it smaller", "")
        if status in (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV, -FAILED):
            size = f"{MEMORY_BYTES >> 20} MiB"
            return Refusal(f"to compile it takes more than {size}; make it smaller", "")
        raise Unavailable("The process that tries grammars was ended; send it again.")
