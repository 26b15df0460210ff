"""OpenTelemetry: a span for every request, sent to a collector from a thread of its own.

Names of attributes are those of OpenTelemetry's conventions for HTTP and generative AI; the times
have vLLM's names. `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER`,
`OTEL_EXPORTER_OTLP_HEADERS` and the other variables of OpenTelemetry's SDK count, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from reft_runtime.reaching import shown_address
from reft_runtime.version import VERSION
from server.logs import is_quiet, shown
from server.tenants.tenant import OWNER, Tenant

if TYPE_CHECKING:
    from server.generation import Job, Run

logger = logging.getLogger("reft")

FLUSH_SECONDS = 5
"""Seconds that a stop waits for the collector to take the last spans."""

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
}
"""What OpenTelemetry calls the operation of a route."""


class RequestTracing:
    """Makes spans of requests that have ended, and sends them; a request never waits for that.

    Where the collector does not keep up, spans are dropped.
    """

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's URL for traces, such as `http://host:4318/v1/traces`."""
        own = Resource.create({SERVICE_NAME: "reft-server", SERVICE_VERSION: VERSION})
        resource = own.merge(OTELResourceDetector().detect())  # what the variables say comes first
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = _Exporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("reft-server", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    @property
    def problem(self) -> str | None:
        """Why spans are lost; None while the collector takes them."""
        return self._exporter.problem

    def ended(self, scope: Scope, status: int | None, seconds: float) -> str | None:
        """Make the span of a request that took so long and has ended just now.

        Its parent is the one that the request's `traceparent` names. Returns the trace's id, None
        for a request that is not traced: one of health, metrics or the page, or one that the
        sampler leaves out. `status` is None if the client left before the answer.
        """
        if is_quiet(scope["path"]):
            return None
        now = time.time_ns()
        began = now - int(seconds * 1e9)
        route = getattr(scope.get("route"), "path", None)
        headers = Headers(scope=scope)
        span = self._tracer.start_span(
            f"{scope['method']} {route}" if route else scope["method"],
            self._propagator.extract(
                {name: headers.getlist(name) for name in self._propagator.fields}
            ),
            SpanKind.SERVER,
            _of_http(scope, status, route),
            start_time=began,
        )
        context = span.get_span_context()
        if span.is_recording():
            job, run = scope["state"].get("job"), scope["state"].get("run")
            if job is not None:
                span.set_attributes(_of_generation(job, run, seconds, route))
            if run is not None and run.first_token_seconds is not None:
                at = began + int(run.first_token_seconds * 1e9)
                span.add_event("first token", timestamp=at)
            broken = run is not None and "error" in run.ends  # in a stream, behind its status
            if broken or (status is not None and status >= 500):
                span.set_status(Status(StatusCode.ERROR))
        span.end(now)
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def close(self) -> None:
        """Send what is left, and end the thread; a collector that is away or slow gets no more."""
        # OpenTelemetry itself would wait for half a minute.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)
        if ending.is_alive():
            logger.warning("%s did not take the last spans, so they are lost", self._exporter.place)


class _Exporter(OTLPSpanExporter):
    """Says once that spans are lost, where OpenTelemetry's own logs four lines for each batch."""

    def __init__(self, endpoint: str) -> None:
        self._answers = _Answers()
        super().__init__(endpoint=endpoint, session=self._answers)
        self.problem: str | None = None
        self.place = shown_address(endpoint)
        # The second quotes headers that are not valid, which anyone can send.
        for name in ("opentelemetry.exporter", "opentelemetry.trace"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send some spans; called by a thread of OpenTelemetry's."""
        self._answers.refusal = ""
        result = super().export(spans)
        if result is not SpanExportResult.SUCCESS:
            if self.problem is None:
                self.problem = f"{self.place} takes no spans: {self._answers.refusal}"
                logger.warning("%s, so they are lost", self.problem)
        elif self.problem is not None:
            logger.info("%s takes spans again", self.place)
            self.problem = None
        return result


class _Answers(requests.Session):
    """Keeps why the first of several tries failed, without what is secret in a URL or a header."""

    refusal = ""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request; raises `RequestException` for a redirection, which nobody follows."""
        try:
            answer = super().request(*args, **kwargs)
            if 300 <= answer.status_code < 400:  # would count as taken
                raise requests.HTTPError(f"{answer.status_code} {answer.reason}")
        except Exception as error:
            self.refusal = self.refusal or _why(error)
            raise
        if not answer.ok:
            self.refusal = self.refusal or f"{answer.status_code} {answer.reason}"
        return answer


def _why(error: Exception) -> str:
    """What an error of requests says; those about URLs and headers quote them whole."""
    if isinstance(error, ValueError):
        return type(error).__name__
    return str(getattr(error.args[0], "reason", error) if error.args else type(error).__name__)[
        :400
    ]


def _of_http(scope: Scope, status: int | None, route: str | None) -> dict[str, Any]:
    tenant: Tenant | None = scope["state"].get("tenant")
    found = {
        "http.request.method": scope["method"],
        "url.scheme": scope["scheme"],
        "url.path": shown(scope["path"]),
        "http.route": route,
        "http.response.status_code": status,
        "error.type": str(status) if status is not None and status >= 500 else None,
        "reft.request_id": scope["state"]["request_id"],
        "reft.tenant": None if tenant is None or tenant is OWNER else tenant.name,
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_generation(job: Job, run: Run | None, seconds: float, route: str | None) -> dict[str, Any]:
    """Attributes for what a request asked of the engine and got so far."""
    found: dict[str, Any] = {
        "gen_ai.provider.name": "reft-server",
        "gen_ai.operation.name": _OPERATIONS.get(route or ""),
        "gen_ai.response.id": job.id,
        "gen_ai.response.model": job.label,
        "gen_ai.usage.input_tokens": job.prompt_tokens,
        "gen_ai.latency.e2e": seconds,
        "reft.interventions": list(job.versions) or None,
    }
    if run is not None:
        found |= {
            "gen_ai.usage.output_tokens": run.completion_tokens,
            "gen_ai.response.finish_reasons": run.ends or None,
            "gen_ai.latency.time_in_queue": run.queue_seconds,
            "gen_ai.latency.time_to_first_token": run.first_token_seconds,
        }
    return {name: value for name, value in found.items() if value is not None}
