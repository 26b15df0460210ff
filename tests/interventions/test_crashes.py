"""Changes that a process does not survive: the next start finds what was before, or what is new."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.interventions.crashing import CHANGES


def test_a_process_that_is_killed_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.interventions.crashing", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert killed.keys() == CHANGES.keys()
    # A change of a pointer opens, renames and syncs at least; a load keeps nothing that is named.
    assert all(points >= 2 for points in killed.values()), killed
