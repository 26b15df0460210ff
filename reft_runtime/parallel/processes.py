"""The other ranks as processes of this machine, with their output in this process's log."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from typing import IO

from reft_runtime.errors import Unavailable

LINES = 200
"""Most lines of a rank's output that are logged, and characters of each."""

END_SECONDS = 10.0

_log = logging.getLogger(__name__)


class RankProcess:
    """A rank in a process of its own, which connects to rank 0 at `address`, HOST:PORT."""

    def __init__(self, rank: int, address: str, key: bytes) -> None:
        self.rank = rank
        command = [sys.executable, "-m", "reft_runtime.parallel"]
        found = {"REFT_RANK_KEY": key.hex(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._process = subprocess.Popen(
                [*command, "--rank", str(rank), "--address", address],
                env=os.environ | found,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise Unavailable(f"No process can be started for rank {rank}: {error}") from None
        assert self._process.stdout is not None
        threading.Thread(
            target=self._pass_on, args=(self._process.stdout,), name="reft-rank-log", daemon=True
        ).start()

    def how_ended(self, seconds: float = 0.0) -> str | None:
        """What became of the process, None if it is still there after `seconds`."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def end(self) -> None:
        """Wait for the end of a process that has been told to end; kill it if it does not."""
        if self.how_ended(END_SECONDS) is None:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _pass_on(self, output: IO[str]) -> None:
        with output:
            for number, line in enumerate(output):
                if number < LINES:
                    _log.warning("rank %d: %s", self.rank, line.rstrip()[:LINES])
                elif number == LINES:
                    _log.warning("rank %d: more than %d lines, left out", self.rank, LINES)
