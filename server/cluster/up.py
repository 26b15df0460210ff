"""`reft cluster up`: a cluster that lives as long as the command, and drains when it ends."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from reft_runtime.base.model_files import check_files
from reft_runtime.errors import ConfigError, EngineDead
from server.banner import address_of, announce
from server.cluster.config import ClusterConfig, check_room, read_config
from server.cluster.signals import Ended, Signals
from server.lifecycle import check_exposure, listen
from server.starting import check_folders
from server.tenants.keys import Keys

logger = logging.getLogger("reft.server")

APP = "reft"
"""Name of the application in Ray Serve."""

IDLE_SECONDS = 30
"""Seconds that a connection may be silent."""

CONNECT_SECONDS = 5.0
"""Seconds in which a Ray cluster takes a connection."""

READY_SECONDS = 60.0
"""Seconds in which the address answers once the replicas run."""

DRAIN_SECONDS = "3"
"""Seconds in which the proxies of one machine learn that a front is about to end."""

PROXY_SECONDS = "60"
"""Seconds in which a proxy starts; after Ray Serve's own 5 s a busy machine would have none."""

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DRAIN_SECONDS,
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PROXY_SECONDS,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables of a Ray that is started here, unless they are set."""

LOG_VARIABLES = {
    "RAY_DEDUP_LOGS": "0",  # else lines that differ in their numbers alone are left out
    "RAY_COLOR_PREFIX": "0",
}
"""Variables by which Ray passes the log's lines on as they are, unless they are set."""

PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
"""Variables of ports that have numbers of their own, which another cluster here may have."""


def run(path: Path) -> int:
    """Run the cluster of a configuration file until a signal; return the exit status.

    SIGHUP reads the file again and updates the cluster, replica by replica. Raises `ConfigError`.
    """
    config = read_config(path)
    settings = config.settings
    with listen(settings.host, settings.port, named=_key) as listener:
        check_exposure(listener, settings, _key)
        bound, port = listener.getsockname()[:2]
    Keys.of(settings)  # what is wrong with the keys file is told before Ray starts
    _check_folders(config)
    address = address_of(settings.host, port)
    logger.info("The cluster will answer at %s", address)
    if settings.keys is not None and settings.quota_url is None and config.most_replicas > 1:
        logger.warning(
            "Each replica counts quotas for itself, so a tenant gets them once from each;"
            " settings.quota_url counts them together"
        )
    signals = Signals()
    with ExitStack() as held, suppress(Ended):  # until Ray is gone
        held.enter_context(_held(bound, port))
        with signals.ending():
            cluster = _Cluster(config, port, held, signals)
        try:
            with signals.ending():
                cluster.deploy(config)
                cluster.wait_for(address)
            announce(cluster.banner(address), settings)
            while signals.wait():
                config = _update(cluster, path, signals, config)
        finally:
            cluster.end()
    return 0


def _update(
    cluster: _Cluster, path: Path, signals: Signals, served: ClusterConfig
) -> ClusterConfig:
    """Make the cluster as the file now says, or again as `served`; return what it is then."""
    try:
        config = read_config(path)
        _check_folders(config)
        with signals.ending():
            cluster.deploy(config)
    except ConfigError as error:
        logger.error("The cluster stays as it is: %s", error.message)
    except EngineDead as error:
        logger.error("The cluster becomes what it was before: %s", error.message)
        _restore(cluster, signals, served)
    else:
        same = _of_a_start(config) == _of_a_start(served)
        but = "" if same else ", but host, port and ray stay as they are until a new start"
        logger.info("The cluster is as %s says%s", path, but)
        return config
    return served


def _of_a_start(config: ClusterConfig) -> tuple[object, ...]:
    """What an update cannot change."""
    return config.settings.host, config.settings.port, config.ray


def _restore(cluster: _Cluster, signals: Signals, served: ClusterConfig) -> None:
    """Deploy what was served: Ray Serve has ended a replica to make room for one that failed."""
    try:
        with signals.ending():
            cluster.deploy(served)
    except (ConfigError, EngineDead) as error:
        logger.error("It cannot: %s", error.message)
    else:
        logger.info("The cluster is what it was before")


def _check_folders(config: ClusterConfig) -> None:
    """Raise `ConfigError` for folders that replicas on this machine could not read."""
    if config.ray is not None:
        return
    if config.settings.model != "demo":
        check_files(config.settings.model)
    check_folders(config.settings)


def _key(name: str) -> str:
    """A setting by its key in the file."""
    return f"settings.{name}"


class _Cluster:
    """Ray, which is started on this machine or connected to, and the application on it.

    `held` gets the sockets that keep ports for it. Raises `ConfigError`, and `Ended`, which leaves
    nothing: what was started ends with this process.
    """

    def __init__(self, config: ClusterConfig, port: int, held: ExitStack, signals: Signals) -> None:
        self._own = config.ray is None
        self._drain_seconds = config.settings.drain_seconds
        for name, value in (LOG_VARIABLES | (VARIABLES if self._own else {})).items():
            os.environ.setdefault(name, value)
        if self._own:
            for name in PORTS:
                if name not in os.environ:
                    keeper = held.enter_context(_held("0.0.0.0", 0))
                    os.environ[name] = str(keeper.getsockname()[1])
            if "RAY_AUTH_MODE" not in os.environ:
                # Ray's ports are open to other machines: nobody else has the token.
                os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        import ray
        from ray import serve

        from server.cluster.deployments import QUIET

        self._ray, self._serve = ray, serve
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        options: dict[str, Any] = {"address": config.ray, "log_to_driver": True}
        if self._own:
            options |= {"address": "local", "include_dashboard": False}
        try:
            if config.ray not in (None, "auto"):
                _reach(config.ray)
            ray.init(logging_level=logging.WARNING, **options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"ray: there is no Ray to use at {config.ray}: {error}") from None
        except SystemExit:
            raise Ended from None
        signals.install()
        with self._telling("Ray Serve does not start"):
            serve.start(
                proxy_location="EveryNode",
                logging_config=QUIET,
                http_options={
                    "host": config.settings.host,
                    "port": port,
                    "keep_alive_timeout_s": IDLE_SECONDS,
                },
            )

    def deploy(self, config: ClusterConfig) -> None:
        """Make the application as a configuration says.

        Raises `ConfigError` if this machine has no room for it, `EngineDead` if it cannot run.
        """
        from server.cluster.deployments import application

        if self._own:  # to another cluster, nodes may be added
            check_room(config, self._ray.cluster_resources())
        self._drain_seconds = config.settings.drain_seconds
        with self._telling("The replicas cannot run"):
            try:
                self._serve.run(application(config), name=APP, route_prefix="/")
            except RuntimeError as error:
                why = self._reason() or str(error)
                raise EngineDead(f"The replicas cannot run: {why}") from None

    def _reason(self) -> str | None:
        """What ended the start of the replicas or fronts, if Ray Serve says so."""
        application = self._serve.status().applications.get(APP)
        parts = application.deployments.values() if application else ()
        return next(filter(None, (last_error(part.message) for part in parts)), None)

    def wait_for(self, address: str) -> None:
        """Wait until the address answers. Raises `EngineDead` if it does not."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{address}/readyz", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise EngineDead(f"{address} does not answer.") from None
                time.sleep(0.2)

    def banner(self, address: str) -> str:
        """The text that says what is served at the address."""
        from server.cluster.deployments import REPLICA

        with self._telling("The replicas do not answer"):
            handle = self._serve.get_deployment_handle(REPLICA, APP)
            text: str = handle.banner.remote(address).result()
        return text

    def end(self) -> None:
        """Let requests finish, then take the application away, and Ray with it if it is our own."""
        from server.cluster.deployments import close, drain

        logger.info("Running requests get their time to finish")
        try:
            with self._telling("They cannot be waited for"):
                if APP in self._serve.status().applications:
                    drain(APP, self._drain_seconds)
                    if self._own:  # the fronts answer until Ray ends, and the proxy with it
                        close(APP)
                    else:
                        self._serve.delete(APP)
        except EngineDead as error:
            logger.error("%s", error.message)
        self._ray.shutdown()

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Raise what Ray raises in the block as an `EngineDead` that says what has failed."""
        try:
            yield
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EngineDead(f"{what}: {why}") from None


def _reach(address: str) -> None:
    """Raise `OSError` or `ValueError` if nobody listens at HOST:PORT, for which Ray would wait."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def last_error(text: str) -> str | None:
    """The error of this server with which a text of tracebacks ends; None if there is none."""
    found = re.findall(r"^reft_runtime\.errors\.\w+: (.+)$", text, re.MULTILINE)
    return found[-1] if found else None


def _held(host: str, port: int) -> socket.socket:
    """A socket that keeps a port until the proxy binds it; it takes no connections.

    Otherwise one of Ray's processes might get the port, as they take whichever is free.
    """
    keeper = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        keeper.setsockopt(socket.SOL_SOCKET, option, 1)
    keeper.bind((host, port))
    return keeper
