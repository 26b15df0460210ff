"""The FastAPI application: which routes there are, and who may use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI

from reft_runtime.base.stages import stage
from reft_runtime.errors import ConfigError
from reft_runtime.version import VERSION
from server.auth import require_access, require_key
from server.context import Context, Tracing
from server.cors import with_cors
from server.errors import install_error_handlers, refuse_query
from server.health import Health
from server.metrics import Metrics
from server.middleware import RequestMiddleware
from server.replicas import Replicas
from server.routes import (
    chat,
    classify,
    completions,
    files,
    interventions,
    me,
    models,
    operations,
    page,
    responses,
    stats,
    tokenize,
    usage,
    versions,
    vllm_compat,
)
from server.settings import Settings
from server.threads import started_pool

if TYPE_CHECKING:
    from server.engine import WholeEngine


def create_app(
    engine: WholeEngine, settings: Settings, replicas: Replicas | None = None
) -> FastAPI:
    """Build the application that serves `engine`; the engine's owner closes the engine.

    `replicas` are the servers of its cluster, None if it is by itself.

    The application is ready for requests once it has started. Raises `ConfigError` for a keys file
    that is not usable, and for variables of OpenTelemetry's that are not.
    """
    tracing = _tracing(settings)
    context = Context(engine, settings, Metrics(engine), Health(engine), replicas, tracing)
    context.metrics.problems.set_function(
        lambda: len(context.problems()) + (engine.registry.state_problem() is not None)
    )
    # FastAPI's own pages would need no key: the description is a route like any other here.
    app = FastAPI(
        title="reft-server",
        version=VERSION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirection would name this server as it sees itself, not as clients do through a proxy.
        redirect_slashes=False,
        # What generated clients call an operation: the handler's name.
        generate_unique_id_function=lambda route: route.name,
        lifespan=lambda app: _running(context),
    )
    app.state.context = context
    app.add_middleware(RequestMiddleware, context=context)
    # Outermost: without these headers a browser hides an answer, even an error, from a page.
    app.add_middleware(with_cors, settings.origins)
    install_error_handlers(app)
    app.router.routes.extend(page.routes)
    app.include_router(operations.public)
    checks = [require_key, require_access, refuse_query]
    guarded = APIRouter(dependencies=[Depends(check) for check in checks])
    for module in (
        completions,
        chat,
        responses,
        classify,
        models,
        interventions,
        versions,
        files,
        vllm_compat,
        tokenize,
        me,
        stats,
        usage,
        operations,
    ):
        guarded.include_router(module.router)
    app.include_router(guarded)
    return app


@asynccontextmanager
async def _running(context: Context) -> AsyncIterator[None]:
    """Prove that the engine answers, then keep up what goes on beside requests in the block."""
    asyncio.get_running_loop().set_default_executor(started_pool())
    with stage("Answering a first prompt"):
        await context.health.prove()
    context.usage.start()
    watches = [
        asyncio.ensure_future(context.rates.watch(context.engine.stats)),
        asyncio.ensure_future(context.keys.follow(context.administer)),
        asyncio.ensure_future(context.quotas.watch()),
    ]
    yield
    for watch in watches:
        watch.cancel()
    await asyncio.wait(watches)
    await context.quotas.close()
    await asyncio.to_thread(context.usage.close)
    if context.tracing is not None:
        await asyncio.to_thread(context.tracing.close)
    context.close()


def _tracing(settings: Settings) -> Tracing | None:
    endpoint = settings.otlp_traces_endpoint
    if endpoint is None:
        return None
    from server.tracing import RequestTracing  # its packages are an extra's

    try:
        return RequestTracing(endpoint.get_secret_value())
    except ValueError as error:
        raise ConfigError(f"OpenTelemetry's variables (OTEL_...): {error}") from None
