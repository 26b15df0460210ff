"""A cluster's configuration: each mistake is told with its place and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import ConfigError
from server.cluster.config import parse_config, read_config


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
        ({"replicas": 2, "autoscaling": {"max": 2}}, ["replicas and autoscaling: give one"]),
        ({"autoscaling": {"min": 3, "max": 2}}, ["autoscaling: min is 3, more than max, 2;"]),
        ({"autoscaling": {"max": 2}}, ["settings.state_dir: several replicas need one"]),
        ({"replicas": 2}, ["settings.state_dir: several replicas need one"]),
        ({"settings": {"metrics_port": 9000}}, ["settings.metrics_port: a cluster has none;"]),
        ({"settings": {"device": "cuda"}}, ["resources.gpus: a replica computes on 1 GPU; give 1."]),
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
    [(b"a: [1", "is no YAML"), (b"\xff", "it is no text in UTF-8"), (b"replicas: 0", "replicas:")],
)
def test_files(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=told) as found:
        read_config(file)
    assert str(file) in found.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
