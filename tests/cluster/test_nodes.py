"""A cluster on several nodes, which this machine simulates; one of them is removed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_runtime.base.shape import base_shape
from server.cluster.config import parse_config
from tests.cluster.real import NAMES, body, configuration
from tests.interventions.make import file_bytes
from tests.training.make import folder

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.long


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """Ray on a head and two nodes, each with room for one replica, and the cluster's address."""
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray import serve
    from ray.cluster_utils import Cluster

    from server.cluster.deployments import application

    files = tmp_path / "interventions"
    files.mkdir()
    model = folder(tmp_path / "model")
    for seed, name in enumerate(NAMES):
        (files / f"{name}.safetensors").write_bytes(file_bytes(seed, base=base_shape(str(model))))
    config = parse_config(configuration(model, files, tmp_path, resources={"cpus": 1}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        # Simulated nodes have one network: their proxies would share the port.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(config), name="reft", route_prefix="/")
        yield cluster, f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        cluster.shutdown()


def nodes_of(deployment: str) -> set[str]:
    """Ids of the nodes that have replicas of a deployment."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    prefix = f"ServeReplica:reft:{deployment}"
    return {str(one.node_id) for one in actors if one.class_name == prefix}


async def test_a_node_is_removed_under_load(nodes: tuple[Any, str]) -> None:
    cluster, url = nodes
    with_replica, with_front = nodes_of("replica"), nodes_of("front")
    assert len(with_replica) == 2
    victim = next(
        node
        for node in cluster.worker_nodes
        if node.node_id in with_replica and node.node_id not in with_front
    )
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        answered, ended = 0, False

        async def ask_on() -> None:
            nonlocal answered
            while not ended:
                for name in NAMES:
                    answer = await client.post("/v1/completions", json=body(name))
                    assert answer.status_code == 200, answer.text
                    answered += 1

        clients = [asyncio.ensure_future(ask_on()) for _ in range(4)]
        await asyncio.sleep(2)
        before = answered
        await asyncio.to_thread(cluster.remove_node, victim, False)
        await asyncio.sleep(10)
        ended = True
        await asyncio.gather(*clients)
        assert answered > before > 0
        stats = (await client.get("/v1/stats")).json()
        assert stats["replicas"] == 1
        cluster.add_node(num_cpus=1)
        async with asyncio.timeout(120):
            while (await client.get("/v1/stats")).json()["replicas"] != 2:
                await asyncio.sleep(0.5)
