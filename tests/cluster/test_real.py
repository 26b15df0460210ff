"""A cluster as `reft cluster up` runs it: two replicas of a tiny model on Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from reft_runtime import Engine, SamplingParams
from reft_runtime.base.shape import base_shape
from reft_runtime.use import Use
from tests.interventions.make import file_bytes
from tests.training.make import folder

pytest.importorskip("ray.serve")

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
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in found if "ServeReplica:reft:replica" in " ".join(one.cmdline())]


def body(name: str, **fields: Any) -> dict[str, Any]:
    return {"model": name, "prompt": "you and the", "max_tokens": 24, "temperature": 0} | fields


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("cluster")
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
    config.write_text(yaml.safe_dump(configuration(model, files, place)))
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
        assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(ray_folder, ignore_errors=True)


def configuration(model: Path, files: Path, place: Path) -> dict[str, Any]:
    return {
        "settings": {
            "model": str(model),
            "interventions": [str(files)],
            "state_dir": str(place / "state"),
            "dtype": "float32",
            "threads": 1,
            "port": 0,
            "drain_seconds": 5,
        },
        "replicas": 2,
        "resources": {"cpus": 0},
    }


def _address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"Serving at (\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def by_replica(metrics: str, sample: str) -> Counter[str]:
    """The values of a metric by replica, of the series whose lines begin so."""
    found: Counter[str] = Counter()
    for line in metrics.splitlines():
        if line.startswith(sample):
            found[line.partition('replica="')[2].partition('"')[0]] += int(float(line.split()[-1]))
    return found


def test_affinity_and_equal_answers(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        for _ in range(4):
            for name, text in running.tokens.items():
                answer = client.post("/v1/completions", json=body(name)).raise_for_status()
                assert answer.json()["choices"][0]["text"] == text
                assert len(answer.headers.get_list("x-request-id")) == 1
        metrics = client.get("/metrics").text
        for name in NAMES:
            series = f'reft:intervention_requests_total{{intervention="{name}"'
            counted = by_replica(metrics, series)
            assert sorted(counted.values()) == [4]  # one replica alone had them
        stats = client.get("/v1/stats").json()
        assert stats["replicas"] == 2
        assert client.get("/readyz").json() == {"status": "ok"}
        assert client.get("/v1/usage").json()["total"]["requests"] == 4 * len(running.tokens)


def test_changes_reach_both(running: Running) -> None:
    """Uploads of many parts, streams, and every answer of the version that the change made."""
    shape = base_shape(str(running.config.parent / "model"))
    files = [file_bytes(seed, base=shape) for seed in (20, 21)]
    large = bytes(6 * 2**20)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        refused = client.put("/v1/interventions/large", content=large)
        assert refused.json()["error"]["code"] == "invalid_file"
        name = "/v1/interventions/fresh"
        for file in (*files, None):  # two uploads, then a roll-back to the first of them
            if file is None:
                changed = client.post(f"{name}/rollback")
            else:
                changed = client.put(name, content=file)
            changed.raise_for_status()
            assert "x-replicas-behind" not in changed.headers
            digest = changed.json()["digest"]
            for _ in range(4):  # without an intervention's affinity
                listed = client.get("/v1/models").json()["data"]
                assert {one["root"] for one in listed if one["id"] == "fresh"} == {digest}
        assert client.get(f"{name}/file").content == files[0]
        with client.stream("POST", "/v1/completions", json=body("fresh", stream=True)) as answer:
            pieces = list(answer.iter_text())
        assert "".join(pieces).endswith("data: [DONE]\n\n")


def test_a_client_that_leaves(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        asked = body("task0", stream=True, max_tokens=200, n=8, ignore_eos=True)
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            next(answer.iter_bytes())
        until(lambda: client.get("/v1/stats").json()["running"] == 0)
        assert client.get("/v1/stats").json()["finished"]["abort"] >= 1


async def test_a_replica_is_killed(running: Running) -> None:
    """Its streams end with an error, all other requests are answered, and it is replaced."""
    before = {one.pid for one in running.replicas()}
    assert len(before) == 2
    async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
        # Requests to the base spread, so that either replica has some.
        names, begun = [*NAMES, *[BASE] * 12], asyncio.Semaphore(0)
        streams = [asyncio.ensure_future(_stream(client, name, begun)) for name in names]
        for _ in names:
            await begun.acquire()
        os.kill(min(before), signal.SIGKILL)
        wholes = [asyncio.ensure_future(_whole(client, running, name)) for name in NAMES * 5]
        ends = Counter(await asyncio.gather(*streams))
        assert set(ends) == {"whole", "replica_died"}
        assert all(await asyncio.gather(*wholes))

        async def full() -> bool:
            stats = (await client.get("/v1/stats")).json()
            return bool(stats.get("replicas") == 2 and len(running.replicas()) == 2)

        async with asyncio.timeout(120):
            while not await full():
                await asyncio.sleep(0.2)
    assert {one.pid for one in running.replicas()} - before


@pytest.mark.long
async def test_an_update_under_load(running: Running) -> None:
    """SIGHUP replaces replica by replica, and no request fails."""
    config = yaml.safe_load(running.config.read_text())
    config["settings"]["max_queued"] = 500
    running.config.write_text(yaml.safe_dump(config))
    before = {one.pid for one in running.replicas()}
    told = running.log.read_text().count("The cluster is as")
    async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
        running.process.send_signal(signal.SIGHUP)
        answered = 0
        async with asyncio.timeout(180):
            while running.log.read_text().count("The cluster is as") == told:
                answered += await _whole(client, running, NAMES[answered % len(NAMES)])
        assert answered
    until(lambda: not before & {one.pid for one in running.replicas()})


async def _stream(client: httpx.AsyncClient, name: str, begun: asyncio.Semaphore) -> str:
    """How a stream ended; `begun` is released when its first piece has come."""
    asked = body(name, stream=True, max_tokens=240, n=8, ignore_eos=True)
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        text = ""
        async for piece in answer.aiter_text():
            if not text:
                begun.release()
            text += piece
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    error = json.loads(events[-1].removeprefix("data: ")).get("error")
    return error["code"] if error else "whole"


async def _whole(client: httpx.AsyncClient, running: Running, name: str) -> bool:
    answer = await client.post("/v1/completions", json=body(name))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == running.tokens[name]
    return True


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
