"""What README tells a newcomer to type, as it stands there, but for the address and the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx

from server.banner import QUESTION, SHOWN

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, part: str) -> str:
    """The one block of a language that contains `part`."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    [found] = [text for kind, text in blocks if kind == language and part in text]
    assert isinstance(found, str)
    return found


def python(code: str) -> str:
    """What the code prints, run in the project's folder."""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shell(command: str, url: str) -> str:
    """What the command prints, for the server at this address."""
    assert "http://127.0.0.1:8000" in command
    command = command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl --silent ")
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


def test_curl(url: str) -> None:
    command = block("", "/v1/chat/completions")
    asked = json.loads(command[command.index("{") : command.rindex("}") + 1])
    assert (asked["model"], asked["messages"][0]["content"]) == (SHOWN, QUESTION)
    answer = json.loads(shell(command, url))
    text = answer["choices"][0]["message"]["content"]
    assert text
    assert f"answers `{text}`" in README


def test_openai_client(url: str) -> None:
    code = block("python", "import OpenAI").replace("http://127.0.0.1:8000", url)
    assert code.count(url) == 1
    assert python(code).strip()


def test_library() -> None:
    lines = python(block("python", "import Engine")).splitlines()
    assert "Arr" in lines[0]
    assert len(set(lines)) >= 3


def test_own_intervention(url: str, tmp_path: Path) -> None:
    file, ours = "/tmp/mine.safetensors", str(tmp_path / "mine.safetensors")
    python(block("python", file).replace(file, ours))
    put = block("", "-X PUT")
    assert file in put
    created = json.loads(shell(put.replace(file, ours), url))
    assert created["manifest"]["description"] == "No"
    question, base, called, mine = re.findall(r"`([^`]+)`", README[README.index("asked `") :])[:4]
    assert called == "mine"
    for model, begins in (("mine", mine), (created["manifest"]["base"]["model"], base)):
        asked = {"role": "user", "content": question}
        body = {"model": model, "messages": [asked], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        said = answer["choices"][0]["message"]["content"]
        assert begins.startswith(said) or said.startswith(begins)
    assert httpx.delete(f"{url}/v1/interventions/mine").status_code == 200
