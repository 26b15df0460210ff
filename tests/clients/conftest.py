"""One server of the demo model for all clients, which have an environment of their own.

`make test-clients` runs these tests: the environment of the clients has neither torch nor this
project, and REFT_SERVER_PYTHON names the Python of the one that has.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.asked import CONTEXT

ROOT = Path(__file__).parents[2]

TOOL_TEMPLATE = ("--tool-template", "hermes")
"""Options that give the demo model, whose chat template knows no tools, a template that does."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules that import clients are looked at by `-m clients` alone."""
    test = collection_path.name.startswith("test_")
    return True if test and config.getoption("markexpr") != "clients" else None


@pytest.fixture(scope="session")
def server_python() -> str:
    """The Python that runs the server; it has torch and transformers, too."""
    python = os.environ.get("REFT_SERVER_PYTHON")
    if python is None:
        pytest.exit("REFT_SERVER_PYTHON names no Python for the server: run `make test-clients`", 4)
    return python


@pytest.fixture(scope="session")
def server_url(server_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the demo model with the interventions that ship, in float32."""
    options = ["--port", "0", "--dtype", "float32", "--max-model-len", str(CONTEXT)]
    command = [server_python, "-m", "server.cli.main", "serve", *options, *TOOL_TEMPLATE]
    settings = {name for name in os.environ if name.startswith("REFT_")} - {"REFT_CACHE"}
    environment = {name: os.environ[name] for name in os.environ.keys() - settings}
    path = tmp_path_factory.mktemp("server") / "log"
    with (
        path.open("w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            while not (ready := re.search(r"^Serving at (\S+)$", path.read_text(), re.MULTILINE)):
                assert process.poll() is None, path.read_text()
                time.sleep(0.1)
            yield ready[1]
        finally:
            process.terminate()


@pytest.fixture
def base_url(server_url: str) -> str:
    """What clients of OpenAI's API are given as its address."""
    return f"{server_url}/v1"
