"""Mistakes that need no model are told before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from typer.testing import CliRunner
from server.cli.main import app
for line in sys.stdin.read().splitlines():
    print(CliRunner().invoke(app, line.split()).exception)
"""


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "asked").write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}'
    )
    asked = {
        **dict.fromkeys(
            (
                "generate hi -i ./no --model folder",
                "chat -i ./no --model folder",
                "compare hi -i one+./no --model folder",
                "inspect no",
                "export no --to gguf x.gguf",
                "import no --base here --out x.safetensors",
                "check no",
                "train no",
                "train here --eval no",
                "eval here no",
                "direction here no --layer 1 --out x.safetensors",
                "sweep hi -i one --eval no --model folder",
            ),
            "no: No such file or directory.",
        ),
        **dict.fromkeys(
            (
                "generate hi --model ./no",
                "serve --model ./no --port 0",
                "train here --model ./no",
                "eval here --model ./no",
                "direction here here --model ./no",
            ),
            "model: there is no folder ./no.",
        ),
        **dict.fromkeys(
            (
                "generate hi --interventions no --model demo",
                "chat --interventions no --model demo",
                "serve --interventions no --model demo --port 0",
            ),
            "The interventions folder no does not exist; make it, or name another.",
        ),
        "run asked --out out --interventions no --model demo": (
            "The interventions folder no does not exist; make it, or name another."
            " 0 of 1 answers are in out: run it again."
        ),
        "import here --base ./no --out x.safetensors": "base: there is no folder ./no.",
    }
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(asked),
        capture_output=True,
        check=True,
        cwd=tmp_path,
        text=True,
    )
    told = dict(zip(asked, ended.stdout.splitlines(), strict=True))
    assert told == asked
