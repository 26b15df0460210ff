"""Fronts and replicas as deployments of Ray Serve, and the application that they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reft_runtime.errors import ConfigError
from reft_runtime.quiet import hide_import_messages
from server.cluster.calls import Call, Full, Head, NoReplica, Part, ReplicaDied
from server.cluster.config import ClusterConfig, parse_config, read_config
from server.cluster.front import Front
from server.cluster.peers import Answer, Answers
from server.cluster.ranks import PlacementGroup
from server.cluster.replica import Replica
from server.logs import configure_logging
from server.settings import Settings
from server.starting import start_engine
from server.tenants.keys import Keys

FRONT, REPLICA = "front", "replica"
"""Names of the deployments."""

FRONT_ONGOING = 10_000
"""Requests that one front has under way."""

SPARE_SECONDS = 5
"""Seconds that a replica has to end beyond those that its requests have."""

LOOK_SECONDS = 0.5
"""Pause between two looks at whether one that is to end has requests left."""

CHECK_SECONDS = 5
"""Pause between two looks at a replica's health, and how long it may take to answer one."""

QUIET = {"log_level": "ERROR", "enable_access_log": False}
"""What Ray Serve logs: the replicas log each request, as a server by itself does."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

ENVIRONMENT = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Variables of fronts and replicas: neither blocks its event loop, so one loop is enough."""


class ReplicaDeployment:
    """A replica as Ray Serve runs it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        hide_import_messages()
        configure_logging(settings)
        context = serve.get_replica_context()
        name = context.replica_id.unique_id
        broadcast = _Broadcast(REPLICA, context.app_name)
        launcher = PlacementGroup() if settings.tensor_parallel > 1 else None
        start = partial(start_engine, launcher=launcher)
        self._replica = Replica(settings, name, broadcast, start)
        await self._replica.open()

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """Answer one request."""
        async with aclosing(self._replica.answer(call)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def ask(self, question: str, *arguments: Any) -> Answer:
        """Answer what another replica asks of all."""
        return await self._replica.ask(question, *arguments)

    async def base(self) -> str:
        """The id of the base model."""
        return self._replica.base

    async def banner(self, address: str) -> str:
        """The text that says what is served at an address."""
        return await self._replica.banner(address)

    async def check_health(self) -> None:
        """Raise if this replica is to be replaced."""
        if not self._replica.live:
            raise RuntimeError("The engine has stopped.")

    async def close(self) -> None:
        """Stop: requests had their time at the fronts."""
        await self._replica.close(0)

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):
            await self._replica.close()


class FrontDeployment:
    """A front as Ray Serve runs it."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle[Any]) -> None:
        configure_logging(settings)
        self._front = Front(_Handle(replicas), settings)

    async def drain(self, seconds: float) -> None:
        """See `Front.drain`."""
        await self._front.drain(seconds)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _OneId(self._front)


class _OneId:
    """Leaves `x-request-id` out of answers: Ray Serve adds it to each, and it is the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_without_id)


class _Broadcast:
    """Asks all replicas of a deployment (`server.cluster.peers.Broadcast`)."""

    def __init__(self, deployment: str, app: str) -> None:
        self._name = deployment, app
        self._handle: DeploymentHandle[Any] | None = None

    async def __call__(self, question: str, *arguments: Any, seconds: float) -> Answers:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._name)
        asked: Any = self._handle.broadcast("ask", question, *arguments)
        async with asyncio.timeout(seconds):
            # The public method tells nothing where one does not answer.
            results = await asked._fetch_replica_results_async()
        tasks = [asyncio.ensure_future(result.get_async()) for result in results]
        done, late = await asyncio.wait(tasks, timeout=seconds)
        for task in late:
            task.cancel()
        answers = []
        for task in done:
            with suppress(RayActorError):  # one that has died has nothing to say
                answers.append(task.result())
        return Answers(answers, len(late))


class _Handle:
    """The replicas by their handle (`server.cluster.front.Pool`)."""

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas

    async def base(self) -> str:
        try:
            base: str = await self._replicas.base.remote()
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            raise NoReplica from None
        return base

    async def ask(self, call: Call, key: str) -> AsyncIterator[Head | bytes]:
        kept = any(not isinstance(part, bytes) for part in call.body)
        # By gRPC a token costs half the processor time, but references need Ray's own calls.
        replicas = self._replicas.options(
            method_name="answer", stream=True, session_id=key, _by_reference=kept
        )
        pieces: Any = replicas.remote(call)
        try:
            async for piece in pieces:
                yield piece
        except BackPressureError:
            raise Full from None
        except DeploymentUnavailableError:
            raise NoReplica from None
        except (RayActorError, ActorUnavailableError, ReplicaUnavailableError):
            raise ReplicaDied from None
        finally:
            pieces.cancel()

    async def keep(self, data: bytes) -> Part:
        part: Part = await asyncio.to_thread(ray.put, data)
        return part


def application(config: ClusterConfig) -> serve.Application:
    """The application of a cluster. Raises `ConfigError` for a keys file that is not usable."""
    Keys.of(config.settings)  # what is wrong is told before anything is started
    settings, routing, scaling = config.settings, config.routing, config.autoscaling
    ranks, taken = settings.tensor_parallel, config.resources
    bundle = {"CPU": taken.cpus, "GPU": taken.gpus, "memory": taken.memory or 0}
    environment = {"env_vars": ENVIRONMENT}
    deployed: Any = serve.deployment  # its own types know only the form of a decorator
    replica = deployed(
        ReplicaDeployment,
        name=REPLICA,
        num_replicas=None if scaling else config.replicas or 1,
        autoscaling_config=scaling
        and {
            "min_replicas": scaling.min,
            "max_replicas": scaling.max,
            "target_ongoing_requests": scaling.target_ongoing,
        },
        ray_actor_options={
            "num_cpus": taken.cpus,
            "num_gpus": taken.gpus,
            "memory": taken.memory,
            "runtime_env": environment,
        },
        placement_group_bundles=[bundle] * ranks if ranks > 1 else None,
        max_constructor_retry_count=1,  # what is wrong with a start is wrong with the next, too
        max_ongoing_requests=routing.max_ongoing,
        max_queued_requests=routing.max_queued,
        request_router_config={
            "request_router_class": ROUTER,
            "request_router_kwargs": {"num_fallback_replicas": routing.fallback_replicas},
        },
        health_check_period_s=CHECK_SECONDS,
        health_check_timeout_s=CHECK_SECONDS,
        logging_config=QUIET,
        graceful_shutdown_wait_loop_s=LOOK_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + SPARE_SECONDS,
    )
    front = deployed(
        serve.ingress()(FrontDeployment),
        name=FRONT,
        num_replicas=config.fronts,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        max_ongoing_requests=FRONT_ONGOING,
        logging_config=QUIET,
        graceful_shutdown_wait_loop_s=LOOK_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + 2 * SPARE_SECONDS,
    )
    application: serve.Application = front.bind(settings, replica.bind(settings))
    return application


def drain(app: str, seconds: float) -> None:
    """Let an application's fronts refuse new requests, and end those that are left after `seconds`.

    Otherwise requests that come while its replicas end would wait for others, and be cut off.
    """
    _tell_all(FRONT, app, seconds + SPARE_SECONDS, "drain", seconds)


def close(app: str) -> None:
    """Let the replicas of an application that has drained stop, while its fronts stay."""
    _tell_all(REPLICA, app, SPARE_SECONDS, "close")


def _tell_all(deployment: str, app: str, seconds: float, method: str, *arguments: Any) -> None:
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(deployment, app)
    with suppress(DeploymentUnavailableError):  # none has started
        called = handle.broadcast(method, *arguments)
        called.results(timeout_s=seconds, return_exceptions=True)


def app(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and `serve deploy`, by its import path.

    `args` has the key `config` with a file's path, or what such a file has. Raises `ConfigError`;
    as the address is Ray Serve's own, it does so without keys, too, unless `insecure` is set.
    """
    config = read_config(Path(args["config"])) if set(args) == {"config"} else parse_config(args)
    if not config.settings.needs_key and not config.settings.insecure:
        raise ConfigError(
            "settings: without keys whoever reaches Ray Serve's address can use and change"
            " everything. Give `keys: FILE` or the variable REFT_API_KEY, or say `insecure: true`"
            " if only people you trust can reach it."
        )
    return application(config)
