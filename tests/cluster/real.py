"""A cluster as `reft cluster up` runs it, on Ray Serve, for the time of a block."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from reft_runtime import Engine, SamplingParams
from reft_runtime.base.shape import base_shape
from reft_runtime.use import Use
from tests.interventions.make import file_bytes
from tests.training.make import folder

NAMES = [f"task{number}" for number in range(6)]
BASE = "model"
"""The base's id: its folder's name."""
START_SECONDS = 180.0


@dataclass
class Running:
    """A cluster that runs: its process, its address, and what it was made of."""

    process: subprocess.Popen[str]
    url: str
    config: Path
    log: Path
    tokens: dict[str, str]
    """The answers of one server by itself, by the name of the intervention."""

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas; fronts have no engine's thread."""
        return self.actors("ServeReplica:reft:replica")

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of Ray's actors of a kind."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in found if name in " ".join(one.cmdline())]


def body(name: str, **fields: Any) -> dict[str, Any]:
    """A request's body, whose answer is `Running.tokens` of its name."""
    return {"model": name, "prompt": "you and the", "max_tokens": 24, "temperature": 0} | fields


@contextmanager
def running(place: Path, **parts: Any) -> Iterator[Running]:
    """A cluster whose files are in a folder, with parts of its configuration beside the usual."""
    model, files = folder(place / "model"), place / "interventions"
    files.mkdir()
    for seed, name in enumerate(NAMES):
        (files / f"{name}.safetensors").write_bytes(file_bytes(seed, base=base_shape(str(model))))
    with Engine(str(model), interventions=files, dtype="float32", threads=1) as engine:
        sampling = SamplingParams(temperature=0, max_tokens=24)
        asked: list[str | Use | tuple[str | Use, ...] | None] = [None, *NAMES]
        answers = engine.generate(["you and the"] * len(asked), sampling, intervention=asked)
        tokens = {
            str(name or engine.info.model): answer.text
            for name, answer in zip(asked, answers, strict=True)
        }
    ray_folder = Path(tempfile.mkdtemp(prefix="reft-"))  # short: sockets lie in it
    config, log = place / "cluster.yaml", place / "log"
    config.write_text(yaml.safe_dump(configuration(model, files, place, **parts)))
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli.main", "cluster", "up", str(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_TMPDIR": str(ray_folder)},
        )
    try:
        url = _address(process, log)
        yield Running(process, url, config, log, tokens)
        process.terminate()
        assert _statuses(url) <= {200, 503}
        assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)


def configuration(model: Path, files: Path, place: Path, **parts: Any) -> dict[str, Any]:
    """What a configuration file has: two replicas of a tiny model."""
    settings = {
        "model": str(model),
        "interventions": [str(files)],
        "state_dir": str(place / "state"),
        "dtype": "float32",
        "threads": 1,
        "port": 0,
        "drain_seconds": 5,
    }
    usual = {"replicas": 2, "resources": {"cpus": 0}}
    return usual | parts | {"settings": settings | parts.get("settings", {})}


def _statuses(url: str) -> set[int]:
    """The statuses of answers to requests that come until the port is closed."""
    found = set()
    with httpx.Client(base_url=url, timeout=60) as client, suppress(httpx.TransportError):
        while True:
            found.add(client.get("/v1/models").status_code)
            time.sleep(0.05)
    return found


def _address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"Serving at (\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
