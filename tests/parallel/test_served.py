"""`reft serve --tensor-parallel 2`: its answers, and what becomes of it when a rank is killed."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from reft_runtime.parallel.channel import accept, listener
from reft_runtime.parallel.processes import RankProcess
from tests.helpers.models import generate, tiny
from tests.helpers.tokenizer import tiny_tokenizer

PROMPT = "you and the rest"


class Server:
    """A server of two ranks, its address, and the lines that it logs."""

    def __init__(self, model: Path) -> None:
        self.lines: list[str] = []
        self.url = ""
        command = [sys.executable, "-m", "server.cli.main", "serve", "--tensor-parallel", "2"]
        options = ["--model", str(model), "--dtype", "float32", "--port", "0"]
        self._process = subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._ready.wait(120), self.lines

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self.lines.append(line)
                if found := re.search(r"will answer at (\S+)", line):
                    self.url = found[1]
                if "Answering a first prompt: " in line:
                    self._ready.set()
        self._ready.set()

    @property
    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self._process.pid).children()
        return [one for one in children if "reft_runtime.parallel" in one.cmdline()]

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        status = self._process.wait(60)
        self._reader.join()
        return status


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2, whose attention has biases, with a tokenizer."""
    folder = tmp_path_factory.mktemp("qwen2")
    tiny("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path) -> Iterator[Server]:
    server = Server(model)
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def test_answers_and_a_killed_rank(model: Path) -> None:
    with serving(model) as server:
        asked = {"model": "base", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        answer = httpx.post(f"{server.url}/v1/completions", json=asked | {"model": name}).json()
        tokenizer = tiny_tokenizer()
        made = generate(tiny("qwen2"), tokenizer(PROMPT)["input_ids"], 20)
        assert answer["choices"][0]["text"] == tokenizer.decode(made)

        [rank] = server.ranks
        streamed = asked | {"model": name, "max_tokens": 200, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=streamed) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(rank.pid, signal.SIGKILL)
            end = list(lines)
        assert any('"code":"engine_dead"' in line for line in end)
        assert server.wait() == 1
    said = [line.split(" ", 1)[1] for line in server.lines if "CRITICAL" in line]
    assert said == [
        "CRITICAL Rank 1 of --tensor-parallel was killed by SIGKILL\n",
        "CRITICAL The engine stopped; so does the server\n",
    ]
    assert not any("Traceback" in line for line in server.lines)
    assert not any("torchao" in line or "pytree" in line for line in server.lines)


def test_a_rank_ends_when_rank_0_does() -> None:
    key = secrets.token_bytes(32)
    with listener("127.0.0.1", key, 2) as place:
        host, port = place.address
        process = RankProcess(1, f"{host}:{port}", key)
        rank, connection = accept(place)
    assert (rank, process.how_ended()) == (1, None)
    connection.close()  # as the system does for a process that is killed
    assert process.how_ended(30) == "ended with status 0"
