"""A cluster's configuration: each mistake is told with its place and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from server.cluster.config import (
    Autoscaling,
    ClusterConfig,
    Resources,
    Routing,
    check_room,
    parse_config,
    read_config,
)


def told(data: Any) -> str:
    with pytest.raises(ConfigError) as found:
        parse_config(data)
    return found.value.message


def test_what_is_given(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"settings: {{model: demo, state_dir: {tmp_path}, interventions: [a, b], max_running: 8}}\n"
        "autoscaling: {max: 4}\n"
        "resources: {cpus: 2}\n"
    )
    config = read_config(file)
    assert config.settings.interventions == ("a", "b")
    assert config.settings.max_running == 8
    assert config.settings.shared_state  # replicas share it, whatever is said
    assert config.most_replicas == 4
    assert (config.autoscaling and config.autoscaling.min, config.resources.cpus) == (1, 2)


def test_one_replica_needs_no_state() -> None:
    config = parse_config({"settings": {}})
    assert config.most_replicas == 1
    assert not config.settings.shared_state


def test_variables_count_as_for_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_API_KEY", "secret")
    assert parse_config({"settings": {}}).settings.needs_key


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ([], ["Write a mapping, with `settings:` and `replicas:` for a beginning."]),
        ({"settings": 3}, ["settings: write the options of `reft serve` below it, such as"]),
        (
            {"settings": {"modle": "x", "port": "many"}, "replica": 2},
            [
                "settings.modle: there is no such key; did you mean model?",
                "settings.port: input should be a valid integer",
                "replica: there is no such key; did you mean replicas?",
            ],
        ),
        ({"routing": {"max_ongoin": 1}}, ["routing.max_ongoin: there is no such key; did you"]),
        ({"resources": {"xyzzy": 1}}, ["resources.xyzzy: there is no such key; there are cpus"]),
        ({"replicas": "2"}, ["replicas: input should be a valid integer."]),
        ({"replicas": 0}, ["replicas: input should be greater than or equal to 1."]),
        ({"autoscaling": 3}, ["autoscaling: write its keys below it, each with a value."]),
        ({"routing": None}, ["routing: write its keys below it, each with a value."]),
        ({"replicas": 2, "autoscaling": {"max": 2}}, ["replicas and autoscaling: give one"]),
        ({"autoscaling": {"min": 3, "max": 2}}, ["autoscaling: min is 3, more than max, 2;"]),
        ({"autoscaling": {"max": 2}}, ["settings.state_dir: several replicas need one"]),
        ({"replicas": 2}, ["settings.state_dir: several replicas need one"]),
        ({"settings": {"metrics_port": 9000}}, ["settings.metrics_port: a cluster has none;"]),
        (
            {"settings": {"device": "cuda"}},
            ["resources.gpus: a replica computes on a GPU; give 1."],
        ),
        (
            {"settings": {"tensor_parallel": 2}, "resources": {"gpus": 2}},
            ["resources.gpus: give 1; they are those of each rank."],
        ),
        (
            {"settings": {"tensor_parallel": 2}, "resources": {"cpus": 0}},
            ["resources.cpus: give each rank some, such as 1."],
        ),
    ],
)
def test_mistakes(data: Any, lines: list[str]) -> None:
    message = told(data)
    for line in lines:
        assert line in message


def test_no_line_repeats_a_secret() -> None:
    assert "se\tcret" not in told({"settings": {"api_key": "se\tcret"}})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: [1", "is no YAML"),
        (b"replicas: 1\nreplicas: 2", "the key replicas is given twice"),
        (b"settings: {model: a, model: b}", "the key model is given twice"),
        (b"\xff", "it is no text in UTF-8"),
        (b"replicas: 0", "replicas:"),
    ],
)
def test_files(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=told) as found:
        read_config(file)
    assert str(file) in found.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_the_document_explains_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", text))
    for name, field in ClusterConfig.model_fields.items():
        parts = [
            kind for kind in (Autoscaling, Resources, Routing) if kind.__name__.lower() == name
        ]
        keys = [f"{name}.{key}" for kind in parts for key in kind.model_fields] or [name]
        assert set(keys) <= named, field


def test_what_ray_serve_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")  # without its own warnings
    from server.cluster.deployments import REPLICA, application

    config = parse_config(
        {
            "settings": {"state_dir": str(tmp_path), "drain_seconds": 7, "device": "cuda"},
            "autoscaling": {"min": 2, "max": 5, "target_ongoing": 3},
            "resources": {"cpus": 4, "gpus": 1},
            "routing": {"max_ongoing": 9, "fallback_replicas": 1, "max_queued": 8},
        }
    )
    front = application(config)._bound_deployment
    [replica] = [part for part in front.init_args if hasattr(part, "_bound_deployment")]
    told = replica._bound_deployment
    assert told.name == REPLICA
    scaling = told._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 3
    assert (told.max_ongoing_requests, told.max_queued_requests) == (9, 8)
    assert told._deployment_config.graceful_shutdown_timeout_s > 7
    assert told.ray_actor_options is not None
    assert told.ray_actor_options["num_gpus"] == 1
    router = told._deployment_config.request_router_config
    assert router.request_router_kwargs == {"num_fallback_replicas": 1}
    assert router.request_router_class.endswith("ConsistentHashRouter")


def test_plain_ray_serve_needs_keys() -> None:
    pytest.importorskip("ray.serve")  # without its own warnings
    from server.cluster import deployments

    with pytest.raises(ConfigError, match="insecure: true"):
        deployments.app({"settings": {}})


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"replicas": 3}, r"resources\.cpus: the replicas need 3, and this machine has 2"),
        ({"autoscaling": {"min": 4, "max": 9}}, r"resources\.cpus: the replicas need 4"),
        ({"settings": {"tensor_parallel": 4}}, r"resources\.cpus: the replicas need 4"),
        (
            {"resources": {"gpus": 1}},
            r"resources\.gpus: the replicas need 1, and this machine has 0",
        ),
    ],
)
def test_what_a_machine_has_no_room_for(parts: dict[str, Any], told: str) -> None:
    has = {"CPU": 2.0, "memory": 1e10, "node:10.0.0.1": 1.0}
    state = {"settings": {"state_dir": "/state"}}
    with pytest.raises(ConfigError, match=told):
        check_room(parse_config(state | parts), has)
    check_room(parse_config(state | {"autoscaling": {"max": 9}}), has)
    check_room(parse_config(state | {"replicas": 9, "resources": {"cpus": 0.2}}), has)


def test_origins_may_be_a_list() -> None:
    origins = ["https://a.example", "https://b.example"]
    assert parse_config({"settings": {"allowed_origins": origins}}).settings.origins == origins
    assert parse_config({"settings": {"allowed_origins": []}}).settings.origins == []
    assert "settings.allowed_origins: write '*', or" in told({"settings": {"allowed_origins": [3]}})
