"""The lines of docs/clients.md run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.clients.conftest import ROOT

pytestmark = pytest.mark.clients

BLOCKS = re.findall(
    r"^## (\S+)\n\n```python\n(.*?)^```$",
    (ROOT / "docs/clients.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("client", "lines"), BLOCKS, ids=[client for client, _ in BLOCKS])
def test_lines(server_url: str, client: str, lines: str) -> None:
    assert len(BLOCKS) == 6
    lines = lines.replace("http://127.0.0.1:8000", server_url)
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks GitHub
    ran = subprocess.run(
        [sys.executable, "-c", lines], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
