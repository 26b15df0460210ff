"""Processes as copies of one that has imported what takes seconds: torch, transformers, the server.

For tests of what a process does and how it ends, not of how it begins.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.fork_server"])


def _begin(
    main: Callable[..., int], arguments: Iterable[str], written: Connection, stdout: str | None
) -> None:
    """In the new process: print into the pipe, in blocks, as a command does."""
    os.dup2(written.fileno(), 2)
    os.dup2(written.fileno() if stdout is None else os.open(stdout, os.O_WRONLY), 1)
    written.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # as long as the process
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    status = main(*arguments)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)  # as the command ends, without what torch's libraries say then


def reft(folder: str, *arguments: str) -> int:
    """In a process that has imported what takes seconds: run the command, in a folder."""
    from server.cli.main import main

    atexit.unregister(os._exit)  # the fork server's: the command ends with a status of its own
    os.chdir(folder)
    sys.argv = ["reft", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


class Forked:
    """A process that runs `main(*arguments)`, a module's function, and ends with its status.

    `output` is what it prints: on both streams, unless `stdout` names a file for one of them.
    """

    def __init__(
        self, main: Callable[..., int], *arguments: str, stdout: str | None = None
    ) -> None:
        reader, writer = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_begin, args=(main, arguments, writer, stdout))
        self._process.start()
        writer.close()
        self.output = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.log: list[str] = []
        self._reader = threading.Thread(target=self.log.extend, args=[self.output])

    def read_on(self) -> None:
        """Keep what it prints from here on in `log`; else it might block on the pipe."""
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id; 0 when it has ended."""
        return 0 if self._process.exitcode is not None else self._process.pid or 0

    def send_signal(self, number: int) -> None:
        if self.pid:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Wait for the exit status, of a signal negative."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it goes on"
        return self._process.exitcode

    def end(self) -> int:
        """Wait for the exit status and the last line."""
        status = self.wait(30)
        if self._reader.ident is not None:
            self._reader.join()
        self.output.close()
        return status

    def kill(self) -> None:
        self._process.kill()
