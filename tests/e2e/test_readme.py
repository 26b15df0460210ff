"""Every block of README, and the Python and JSON of the other documents, from a fresh folder.

`make serve` is what README says first: it is the server that all other blocks ask. Commands run
as they stand there, but for the address and for `/tmp`. Trainings take two steps of some rows;
`make test-long` runs them as they are written, looks at what they print, and runs what loads a
model in the other documents.
"""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from server.banner import QUESTION, SHOWN
from tests.helpers.documents import ROOT, Block, blocks, commands, is_shown
from tests.helpers.forked import Forked, reft

ADDRESS = "http://127.0.0.1:8000"
SERVE = "make serve\n"
REFT = ".venv/bin/reft"
PLAIN = re.compile(rf"{re.escape(REFT)}( [\w./:@=-]+)+")
STEPS = " --steps 2 --batch-size 2"
FEW = 16
"""Rows of a quick training."""
SECONDS = 900
"""After which a command is taken to hang."""

NOT_RUN = {
    "pipx install": "installs torch anew, minutes; tests/test_wheel.py installs a wheel",
    "meta-llama/": "a gated model of 16 GB",
}
"""Blocks that nobody can run here, by a part of their text, and why."""

OTHERS = [
    "docs/interventions.md",
    "docs/python.md",
    "docs/structured.md",
    "docs/training.md",
    "interventions/README.md",
]
BLOCKS = [
    *blocks("README.md"),
    *(b for name in OTHERS for b in blocks(name) if b.language in ("python", "json")),
]
DATA = "interventions/data/"
GIVEN = {"tickets.csv": "data/tickets.csv", "held-out.csv": "data/tickets-test.csv"}
"""Files that documents take for granted, from `interventions/`."""


def why_not(block: Block) -> str | None:
    """Why a block is not run."""
    if block.language == "text":
        return "a picture"
    reasons = [reason for part, reason in NOT_RUN.items() if part in block.text]
    return reasons[0] if reasons else None


RUN = [block for block in BLOCKS if why_not(block) is None and block.text != SERVE]
MODEL = re.compile(r"reft train|train\(|Engine\(")
QUICK = [b for b in RUN if b.document == "README.md" or not MODEL.search(b.text)]
LONG = [b for b in RUN if b not in QUICK or "reft train" in b.text]


@dataclass(frozen=True, slots=True)
class Place:
    """A fresh copy of the project with an environment in `.venv`, and its server."""

    folder: Path
    url: str
    said: str
    done: set[Block] = field(default_factory=set)

    def here(self, text: str) -> str:
        """A text with this server's address, and with this folder for /tmp."""
        return text.replace(ADDRESS, self.url).replace("/tmp/", f"{self.folder}/")

    def run(self, command: list[str]) -> str:
        """What a command prints, in the folder and with no environment active.

        `reft` runs in a fork, which has imported what takes seconds; `make serve` begins anew.
        """
        if command[0] == REFT:
            process = Forked(reft, str(self.folder), *command[1:])
            said = process.output.read()
            assert process.end() == 0, said
            return said
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=outside(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout


def as_list(text: str) -> list[str]:
    """A command of a document, which a shell reads unless it is `reft` with plain words alone."""
    return text.split() if PLAIN.fullmatch(text) else ["bash", "-e", "-c", text]


def outside() -> dict[str, str]:
    """This process's variables, as they are where no environment is active and make runs nothing.

    What `make test ARGS=...` was given is not for the documents' `make serve`.
    """
    active = {"VIRTUAL_ENV", "ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    env = {name: value for name, value in os.environ.items() if name not in active}
    ours = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if p != ours)
    return env


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fresh") / "reft-server"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name, source in GIVEN.items():
        shutil.copy(folder / "interventions" / source, folder / name)
    (folder / "few").mkdir()
    for data in (folder / DATA).iterdir():
        lines = data.read_bytes().splitlines(keepends=True)
        (folder / "few" / data.name).write_bytes(b"".join(lines[: FEW + 1]))
    environment = folder / ".venv"
    environment.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    (environment / ".installed").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output = folder / "serve.log"
    with output.open("wb") as file:
        server = subprocess.Popen(
            SERVE.split(),
            cwd=folder,
            env={**outside(), "PORT": str(port)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "Ready." not in output.read_text():
            assert server.poll() is None, output.read_text()
            time.sleep(0.1)
        yield Place(folder, f"http://127.0.0.1:{port}", output.read_text())
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def run_script(path: str) -> int:
    """In a process that has imported what takes seconds: run a script, from its folder."""
    os.chdir(Path(path).parent)
    runpy.run_path(path, run_name="__main__")
    return 0


def run(block: Block, place: Place, *, quick: bool) -> None:
    """Run a block. A transcript must show what its commands print, but with a quick training."""
    text = place.here(block.text)
    if block.language == "python":
        (place.folder / "block.py").write_text(text)
        if "Engine(" in text:  # nothing is imported before it, as for its reader
            place.run([f"{place.folder}/.venv/bin/python", "block.py"])
        else:
            script = Forked(run_script, str(place.folder / "block.py"))
            said = script.output.read()
            assert script.end() == 0, said
    elif block.language == "json":
        answer = httpx.post(f"{place.url}/v1/chat/completions", json=json.loads(text), timeout=60)
        assert answer.status_code == 200, answer.text
    elif block.language == "console":
        exact = True
        for command in commands(text):
            trained = "reft train" in command.text and quick
            exact = exact and not trained
            asked = command.text.replace(DATA, "few/") + STEPS if trained else command.text
            printed = place.run(as_list(asked))
            assert printed.strip()
            assert not exact or is_shown(command.printed, printed), printed
    else:
        assert block.language == "sh", "say what it is: sh, console, python, json or text"
        lines = text.splitlines()
        parts = lines if all(map(PLAIN.fullmatch, lines)) else [text]
        assert "".join(place.run(as_list(part)) for part in parts).strip()


def test_make_serve(place: Place) -> None:
    assert sum(block.text == SERVE for block in BLOCKS) == 1
    assert place.url in place.said
    assert "Ready. Try" in place.said
    assert "torchao" not in place.said, "see reft_runtime/quiet.py"
    assert "Enum" not in place.said


def test_reasons_are_needed() -> None:
    assert all(any(part in block.text for block in BLOCKS) for part in NOT_RUN)


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_block(block: Block, place: Place) -> None:
    run(block, place, quick=True)
    place.done.add(block)


@pytest.mark.long
@pytest.mark.parametrize("block", LONG, ids=str)
def test_block_as_written(block: Block, place: Place) -> None:
    run(block, place, quick=False)


@pytest.mark.long
def test_tickets_held_out(place: Place) -> None:
    """What README's training reaches on rows that it has not seen, over both routes."""
    train = next(b for b in LONG if "tickets.csv --push" in b.text)
    run(train, place, quick=False)
    with (ROOT / "interventions/data/tickets-test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for route in ("completions", "chat/completions"):
        with httpx.Client(base_url=place.url, timeout=600) as client:

            def right(row: dict[str, str], client: httpx.Client = client, at: str = route) -> bool:
                asked = {"prompt": row["text"]}
                if at != "completions":
                    asked = {"messages": [{"role": "user", "content": row["text"]}]}  # type: ignore[dict-item]
                body = {"model": "tickets", "temperature": 0, **asked}
                choice = client.post(f"/v1/{at}", json=body).json()["choices"][0]
                text = choice["text"] if at == "completions" else choice["message"]["content"]
                return bool(text == row["label"] and choice["finish_reason"] == "stop")

            with ThreadPoolExecutor(16) as pool:
                count = sum(pool.map(right, rows))
        assert count >= 0.85 * len(rows), (route, count)


def test_the_first_question_is_the_banners() -> None:
    first = next(b for b in blocks("README.md") if "/v1/chat/completions" in b.text)
    asked = commands(first.text)[0].text
    body = json.loads(asked[asked.index("{") : asked.rindex("}") + 1])
    assert (body["model"], body["messages"][0]["content"]) == (SHOWN, QUESTION)


def test_own_tensors_change_an_answer(place: Place) -> None:
    """What README says that an intervention of one direction answers, and the base."""
    mine = [block for block in QUICK if "/tmp/mine.safetensors" in block.text]
    for block in mine:
        if block not in place.done:
            run(block, place, quick=True)
    text = (ROOT / "README.md").read_text()
    question, base, called, answer = re.findall(r"`([^`]+)`", text[text.index("asked `") :])[:4]
    assert called == "mine"
    with httpx.Client(base_url=place.url, timeout=60) as client:
        served = client.get("/v1/models").json()["data"][0]["id"]
        for model, begins in (("mine", answer), (served, base)):
            asked = [{"role": "user", "content": question}]
            body = {"model": model, "messages": asked, "max_tokens": 8, "temperature": 0}
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            said = choice["message"]["content"]
            assert begins.startswith(said) or said.startswith(begins)
