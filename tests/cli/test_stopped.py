"""Ctrl-C while a server answers several requests at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from reft_runtime.client import Server
from server.cli import main as cli

ROOT = Path(__file__).parents[2]

SECONDS = 20.0
"""No answer comes earlier; a test that waited for one would take as long."""


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_ctrl_c_while_the_command_is_read_shows_no_traceback() -> None:
    code = "import os, signal, sys\n"
    code += "class Asked:\n  def find_spec(*asked):\n    if 'server.cli.main' in asked:\n"
    code += "      os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Asked)\n"
    code += "from importlib.metadata import EntryPoint\n"
    code += f"EntryPoint('reft', {entry_point()!r}, '').load()()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")


def test_ctrl_c_while_the_commands_are_made_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(**options: object) -> None:
        raise KeyboardInterrupt

    left: list[object] = []
    monkeypatch.setattr(cli, "app", stopped)
    monkeypatch.setattr(cli, "_leave", left.append)
    cli.main()
    assert left == [128 + signal.SIGINT]


def entry_point() -> str:
    """Where the console command begins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["scripts"]["reft"])


def test_ctrl_c_ends_the_requests_that_are_under_way(silent: socket.socket) -> None:
    left = threading.Event()

    def serve() -> None:
        with suppress(OSError):
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(SECONDS)
                connection.recv(1 << 16)
                os.kill(os.getpid(), signal.SIGINT)
                while connection.recv(1 << 16):
                    pass
                left.set()

    thread = threading.Thread(target=serve)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Server(f"http://127.0.0.1:{silent.getsockname()[1]}").ask([("/v1/completions", {})])
    assert time.monotonic() - began < SECONDS / 2
    thread.join()
    assert left.is_set(), "the server was not told"
