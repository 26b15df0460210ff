"""The documents name only what there is, and all metrics."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import cast, get_args, get_type_hints

import jsonschema
import pytest
import typer

from reft_runtime import Engine
from reft_runtime.engine.device import ON_CPU, ON_CUDA
from server.app import create_app
from server.cli.main import app
from server.cluster.config import ClusterConfig
from server.metrics import Metrics
from server.openapi import describe
from server.schemas.chat import ChatRequest
from server.schemas.classify import ClassifyRequest
from server.schemas.common import InterventionUse
from server.schemas.completions import CompletionRequest
from server.schemas.responses import ResponsesRequest
from server.settings import Settings
from server.tenants.tenant import Limits, Tenant
from tests.http.fake_engine import FakeEngine

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "interventions/README.md",
]

OTHER_PROGRAMS = {
    *("--build-arg", "--gpus", "--from-literal"),
    *("--nproc-per-node", "--no-python"),
    *("--data-binary", "--data", "--tasks"),
    *("--no-deps", "--wheel-dir", "--constraint", "--constraints", "--pip-args", "--from"),
}
"""Options of docker, kubectl, torchrun, curl, pip, pipx, uvx and our scripts in the documents."""

OTHER_VARIABLES = {"REFT_CACHE", "REFT_PICTURES", "REFT_URL"}
"""No settings of a server: where the demo model is kept, a switch of tests, whom a command asks."""


def options() -> set[str]:
    """Every option of every command of `reft`."""
    commands = [typer.main.get_command(app)]
    for command in commands:  # a group's commands follow it
        commands += getattr(command, "commands", {}).values()
    return {"--help"} | {
        option
        for command in commands
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_and_variables_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert named <= options() | OTHER_PROGRAMS
    variables = {f"REFT_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    assert set(re.findall(r"REFT_[A-Z_]+\b", text)) - {"REFT_"} <= variables


def test_every_option_is_documented() -> None:
    texts = " ".join((ROOT / document).read_text() for document in DOCUMENTS)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", texts))
    assert {option for option in options() if not option.startswith("--no-")} <= named


def test_every_setting_of_a_tenant_is_documented() -> None:
    text = (ROOT / "docs/tenants.md").read_text()
    limits = {f"limits.{name}" for name in get_type_hints(Limits)}
    settings = get_type_hints(Tenant).keys() - {"name", "limits", "patterns", "_seen"}
    assert {"keys", "interventions"} | settings | limits <= set(re.findall(r"`([\w.]+)`", text))


def test_every_key_of_a_cluster_is_documented() -> None:
    table = (ROOT / "docs/cluster.md").read_text().partition("## Configuration")[2]
    named = set(re.findall(r"`([\w.]+)`", table.partition("\n## ")[0]))
    for name, field in ClusterConfig.model_fields.items():
        parts = [part for part in (field.annotation, *get_args(field.annotation)) if part]
        inner = [key for part in parts for key in getattr(part, "model_fields", {})]
        keys = {f"{name}.{key}" for key in inner} if inner and name != "settings" else {name}
        assert keys <= named


def test_the_modules_of_the_map_exist() -> None:
    text = (ROOT / "docs/structure.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)[`:]", text))
    there = {
        str(file.relative_to(ROOT))
        for room in ("server", "reft_runtime", "tests", "tools")
        for file in (ROOT / room).rglob("*.py")
    }
    assert len(named) > 50
    assert {
        name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in there)
    } == set()
    rooms = set(re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE))
    assert "reft_runtime/engine/" in rooms
    assert {room for room in rooms if not (ROOT / room).is_dir()} == set()


def test_operations_explains_every_option_of_serve() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    for name in Settings.model_fields:
        assert f"`--{name.replace('_', '-')}`" in text


def served_metrics() -> set[str]:
    families = Metrics(cast(Engine, FakeEngine())).registry.collect()
    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if not family.name.endswith("_created")
    }


def test_operations_lists_the_metrics() -> None:
    text, served = (ROOT / "docs/operations.md").read_text(), served_metrics()
    assert set(re.findall(r"reft:[a-z_0-9]+", text)) == {n for n in served if n[:5] == "reft:"}
    gateways = (ROOT / "docs/usage.md").read_text()
    assert set(re.findall(r"vllm:[a-z_0-9]+", gateways)) == {n for n in served if n[:5] == "vllm:"}


@pytest.mark.parametrize(
    "file", ["deploy/grafana/dashboards/reft.json", "deploy/alerts.yml", "docs/usage.md"]
)
def test_every_metric_that_is_asked_for_is_served(file: str) -> None:
    asked = re.findall(r"\breft:[a-z_0-9]+", (ROOT / file).read_text())
    assert {name.removesuffix("_bucket") for name in asked} - {
        "reft:intervention_"
    } <= served_metrics()


def test_help_names_the_engines_defaults() -> None:
    parameters = inspect.signature(Engine).parameters
    defaults = {name: parameters[name].default for name in ("max_queued", "max_queued_tokens")}
    on_cpu = {"max_running": ON_CPU.max_running, "max_step_tokens": ON_CPU.max_step_tokens}
    on_device = {
        "max_running": ON_CUDA.max_running,
        "max_step_tokens": ON_CUDA.max_step_tokens,
    }
    for name, default in {**defaults, **on_cpu}.items():
        description = Settings.model_fields[name].description or ""
        assert f"by default {default}" in description
        assert name not in on_device or f"on a CUDA device {on_device[name]}" in description


def test_the_api_page_lists_every_route_and_field() -> None:
    text = (ROOT / "docs/api.md").read_text()
    api = create_app(cast(Engine, FakeEngine()), Settings())
    routes = {
        f"{method.upper()} {path}"
        for path, methods in api.openapi()["paths"].items()
        for method in methods
    }
    assert "PUT /v1/interventions/{name}" in routes
    assert routes <= set(re.findall(r"`([A-Z]+ /[^`]*)`", text))
    bodies = ChatRequest, ClassifyRequest, CompletionRequest, ResponsesRequest, InterventionUse
    for schema in bodies:
        for name in schema.model_fields:
            assert f"`{name}`" in text or f'"{name}"' in text, name


def test_openapi_describes_every_field_and_gives_examples() -> None:
    document = describe(create_app(cast(Engine, FakeEngine()), Settings()))
    silent = [
        f"{schema}.{name}"
        for schema, told in document["components"]["schemas"].items()
        for name, field in told.get("properties", {}).items()
        if name not in ("type", "error") and not field.get("description")
    ]
    assert silent == []
    operations = [
        operation for methods in document["paths"].values() for operation in methods.values()
    ]
    for operation in operations:
        assert operation["description"]
        assert all(parameter["description"] for parameter in operation.get("parameters", ()))
    bodies = [
        operation["requestBody"]["content"]["application/json"]
        for operation in operations
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]
    assert len(bodies) == 9
    for body in bodies:
        jsonschema.validate(body["example"], {**body["schema"], **document})


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, "docs/measurements/README.md", "benchmarks/README.md", "CHANGELOG.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    here = ROOT / document
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", here.read_text()):
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in known, anchor
