"""The log: its set-up, as text or JSON, and the one line that every request gets."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.types import Scope

from reft_runtime.display.text import printable
from server.settings import Settings
from server.tenants.tenant import OWNER, Tenant

if TYPE_CHECKING:
    from server.generation import Job, Run

logger = logging.getLogger("reft.requests")

QUIET_PATHS = {"/livez", "/readyz", "/health", "/metrics"}
"""Paths that programs request every few seconds; they are logged at level debug."""

SHOWN_PATH = 256
"""Most characters of a path that are logged: also those without a key can ask for long ones."""

QUIET_FOLDER = "/page/"
"""Path of the page's files, of which a browser asks for many; they are logged at level debug."""


class TextFormatter(logging.Formatter):
    """Formats a line of the log as text: time (UTC), level, message.

    Further lines, as those of an exception, are indented: a message may quote what came from
    elsewhere, such as a file's name, and is not to be taken for two.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """`record` as text, without control characters."""
        return printable(super().format(record)).replace("\n", "\n  ")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Time of `record` in ISO 8601, UTC, to the millisecond."""
        made = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return made.replace("+00:00", "Z")


class JsonFormatter(TextFormatter):
    """Formats a line of the log as a JSON object.

    Its fields are `time`, `level`, `logger`, `message`, `exception` and those of a request.
    """

    def format(self, record: logging.LogRecord) -> str:
        """`record` as JSON."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "request", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(settings: Settings) -> None:
    """Log to standard error: messages of server and runtime, and warnings of other libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    # `dictConfig` would close the handlers of Ray Serve's own logger as well: its controller asks a
    # replica for that log's path when it comes back, and ends those that cannot tell it.
    # uvicorn's own messages about starting and ending would stand between ours.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("reft", "reft_runtime"):
        logging.getLogger(name).setLevel(settings.log_level.upper())
    logging.getLogger("reft.audit").setLevel(logging.INFO)  # an audit with gaps is none
    logging.captureWarnings(True)


def is_quiet(path: str) -> bool:
    """Whether requests of a path are of no interest by themselves."""
    return path in QUIET_PATHS or path.startswith(QUIET_FOLDER)


def shown(path: str) -> str:
    """A path, shortened: it may be as long as a request's head."""
    return path if len(path) <= SHOWN_PATH else f"{path[:SHOWN_PATH]}..."


def log_request(scope: Scope, status: int | None, seconds: float) -> None:
    """Log one request that has ended; `status` is None if its client left before the answer."""
    level = logging.DEBUG if is_quiet(scope["path"]) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    state = scope["state"]
    fields: dict[str, Any] = {
        "id": state["request_id"],
        "method": scope["method"],
        "path": quote(shown(scope["path"])),
        "status": status,
        **_sender(state.get("tenant")),
        **_generated(state.get("job"), state.get("run")),
        "total_seconds": round(seconds, 4),
    }
    if "trace_id" in state:
        fields["trace_id"] = state["trace_id"]
    logger.log(level, "%s", _line(fields), extra={"request": fields})


def _sender(tenant: Tenant | None) -> dict[str, Any]:
    """The log field that says whose key a request had; none where that is the owner's."""
    return {} if tenant is None or tenant is OWNER else {"tenant": tenant.name}


def _generated(job: Job | None, run: Run | None) -> dict[str, Any]:
    """Log fields of what a request asked of the engine and got so far."""
    if job is None:
        return {}
    fields: dict[str, Any] = {"task": job.label, "prompt_tokens": job.prompt_tokens}
    if run is not None:
        fields |= {
            "completion_tokens": run.completion_tokens,
            "queue_seconds": _rounded(run.queue_seconds),
            "first_token_seconds": _rounded(run.first_token_seconds),
            "finish_reason": ",".join(sorted(set(run.ends))),
        }
    return fields


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _line(fields: dict[str, Any]) -> str:
    """Write the fields that a request has as text, such as `GET /v1/models 200 id=...`."""
    status = "left" if fields["status"] is None else fields["status"]
    words = [f"{fields['method']} {fields['path']} {status}", f"id={fields['id']}"]
    if "tenant" in fields:
        words.append(f"tenant={fields['tenant']}")
    if "task" in fields:
        made = fields.get("completion_tokens", 0)
        words += [f"task={fields['task']}", f"tokens={fields['prompt_tokens']}+{made}"]
    for name in ("queue", "first_token", "total"):
        seconds = fields.get(f"{name}_seconds")
        if seconds is not None:
            words.append(f"{name}={seconds:.3f}s")
    if fields.get("finish_reason"):
        words.append(f"finish={fields['finish_reason']}")
    return " ".join(words)
