"""A replica whose model is computed by ranks in a placement group of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.cluster.real import body, running

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.long

RANKS = {"settings": {"tensor_parallel": 2}, "replicas": 1, "resources": {"cpus": 1}}


def test_answers_and_a_killed_rank(tmp_path: Path) -> None:
    with running(tmp_path, **RANKS) as cluster, httpx.Client(base_url=cluster.url) as client:

        def answers() -> bool:
            for name, text in cluster.tokens.items():
                answer = client.post("/v1/completions", json=body(name), timeout=60)
                if answer.status_code != 200:
                    return False
                assert answer.json()["choices"][0]["text"] == text
            return True

        assert answers()
        assert "torchao" not in cluster.log.read_text()  # nobody can act on what it says
        [replica], [rank] = cluster.replicas(), cluster.actors("_Follower")
        os.kill(rank.pid, signal.SIGKILL)
        deadline = time.monotonic() + 120
        while not (answers() and cluster.replicas() != [replica]):
            assert time.monotonic() < deadline, cluster.log.read_text()
            time.sleep(0.5)
        assert "Rank 1 of --tensor-parallel" in cluster.log.read_text()
