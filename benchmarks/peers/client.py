"""This side of a peer's process: start it, give it jobs, end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.worker import Job, Result

ROOT = Path(__file__).resolve().parents[2]


class PeerFailed(RuntimeError):
    """A peer did not load, or could not run a job; the message ends with what it printed."""


class Peer:
    """A running peer: a module that calls `worker.serve`, under the Python of its environment."""

    def __init__(
        self,
        module: str,
        python: str | Path,
        config: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module = module
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        read, write = os.pipe()
        self._answers = os.fdopen(read)
        command = [str(python), "-m", module, json.dumps(config), str(write)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        )
        os.close(write)
        try:
            self._hear()
        except BaseException:
            self.close()
            raise

    def run(self, job: Job) -> Result:
        """Run one job; `PeerFailed` if it cannot."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what is heard next says why
            print(json.dumps(job), file=self._process.stdin, flush=True)
        answer: Result = self._hear()
        return answer

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._end()
        self._log.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _hear(self) -> Any:
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if not line:
            self._end()  # then all it had to say is in the log
        if "error" in answer:
            self._log.seek(0)
            tail = self._log.read()[-4000:]
            raise PeerFailed(f"{self._module}: {answer['error']}\n{tail}")
        return answer
