"""What `reft cluster up` does around Ray: mistakes told before it starts, and ends at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest

from reft_runtime.errors import ConfigError, EngineDead
from server.cluster import up
from server.cluster.config import ClusterConfig, parse_config
from server.cluster.signals import Ended, Signals


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """What a cluster makes of signals ends with each test."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


def test_a_keys_file_is_read_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "_Cluster", lambda *given: pytest.fail("Ray was started"))
    file = tmp_path / "cluster.yaml"
    file.write_text(f"settings: {{port: 0, keys: {tmp_path}/none.toml}}")
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        up.run(file)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("interventions: [/no/such]", "/no/such does not exist; make it"),
        ("model: /no/such", "model: there is no folder /no/such"),
    ],
)
def test_folders_are_looked_for_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, told: str
) -> None:
    monkeypatch.setattr(up, "_Cluster", lambda *given: pytest.fail("Ray was started"))
    file = tmp_path / "cluster.yaml"
    file.write_text(f"settings: {{port: 0, {settings}}}")
    with pytest.raises(ConfigError, match=told):
        up.run(file)


def test_the_reason_of_a_replica_that_cannot_start() -> None:
    text = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:reft:replica.initialize_and_get_metadata() (pid=7, ip=10.0.0.1)
    raise ConfigError(f"model: there is no folder {path}.", param="model")
reft_runtime.errors.ConfigError: model: there is no folder /models/none."""
    assert up.last_error(text) == "model: there is no folder /models/none."
    assert up.last_error("The deployment is updating.") is None


def _as_code_in_c(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception as error:
        raise SystemError("returned a result with an exception set") from error


def test_a_signal_ends_what_is_under_way() -> None:
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signals = Signals()
        with signals.ending():
            signal.raise_signal(signal.SIGHUP)  # an update waits until this is done
        assert signals.wait()
        with pytest.raises(Ended), signals.ending():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Ended), signals.ending():
            pytest.fail("it has ended")
        signals.ended = False
        with pytest.raises(Ended), signals.ending():
            _as_code_in_c(partial(signal.raise_signal, signal.SIGTERM))
        assert not signals.wait()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


@pytest.mark.parametrize("when", ["ray.init", "ray.serve.start"])
def test_a_signal_while_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pytest.importorskip("ray.serve")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    handlers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {sig: signal.getsignal(sig) for sig in handlers}

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda sig, frame: sys.exit(sig))  # as Ray does
        if when == "ray.init":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.serve.start", lambda **kw: signal.raise_signal(signal.SIGTERM))
    file = tmp_path / "cluster.yaml"
    file.write_text("settings: {port: 0}")
    try:
        assert up.run(file) == 0
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def test_what_ray_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a machine on which its proxy does not come up in time."""
    pytest.importorskip("ray.serve")
    from ray.exceptions import RayError

    def fail(**options: object) -> None:
        raise RayError("The actor died.\n\tclass_name: HAProxyManager")

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.serve.start", fail)
    file = tmp_path / "cluster.yaml"
    file.write_text("settings: {port: 0}")
    with pytest.raises(EngineDead) as raised:
        up.run(file)
    assert raised.value.message == "Ray Serve does not start: The actor died."
    assert os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] == "60"


def test_an_update_that_cannot_run_is_taken_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deployed: list[int | None] = []

    class Cluster:
        def deploy(self, config: ClusterConfig) -> None:
            deployed.append(config.replicas)
            if config.replicas == 2:
                raise EngineDead("The replicas cannot run: no folder.")

    class Signals:
        ending = staticmethod(nullcontext)

    def update() -> ClusterConfig:
        return up._update(Cluster(), file, Signals(), served)  # type: ignore[arg-type]

    file = tmp_path / "cluster.yaml"
    file.write_text(f"{{replicas: 2, settings: {{state_dir: {tmp_path}}}}}")
    served = parse_config({})
    assert update() is served
    assert deployed == [2, None]
    file.write_text("replica: 3")
    assert update() is served
    file.write_text(f"{{replicas: 3, settings: {{state_dir: {tmp_path}}}}}")
    caplog.set_level("INFO", "reft")
    assert update().replicas == 3
    assert deployed == [2, None, 3]
    assert caplog.messages[-1] == f"The cluster is as {file} says"
    file.write_text(f"{{replicas: 3, settings: {{port: 1, state_dir: {tmp_path}}}}}")
    update()
    assert "port and ray stay as they are" in caplog.messages[-1]


def test_where_no_ray_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve")  # without its own warnings
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "cluster.yaml"
    file.write_text(f"ray: 127.0.0.1:{port}\nsettings: {{port: 0}}")
    with pytest.raises(ConfigError, match=f"ray: there is no Ray to use at 127.0.0.1:{port}"):
        up.run(file)


@pytest.mark.parametrize(
    ("settings", "told"),
    [("host: 0.0.0.0", "settings.host: without keys"), ("host: no.such", "with settings.host and")],
)
def test_an_address_that_cannot_be(tmp_path: Path, settings: str, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"settings: {{{settings}, port: 0}}")
    with pytest.raises(ConfigError, match=told):
        up.run(file)


SIGNALLED_TWICE = """
import os, signal, subprocess, sys
from server.cluster.signals import Signals

Signals()
inner = '''
import subprocess
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
child.wait()
'''
child = subprocess.Popen([sys.executable, "-c", inner], start_new_session=True)
sys.stdin.readline()
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_second_signal_leaves_no_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED_TWICE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(60) == 128 + signal.SIGINT
    try:
        grandchild.wait(10)
    except psutil.TimeoutExpired:
        grandchild.kill()
        raise
