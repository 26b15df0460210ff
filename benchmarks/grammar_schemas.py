"""JSON schemas to measure grammar engines by, with texts that must and must not be accepted.

- `packages`: the schemas that some Python packages ship, fetched by name and version;
- `tasks`: schemas of typical extraction tasks and tools (`grammar_tasks`), as pydantic writes them
  and in OpenAI's strict form;
- `suite`: the JSON Schema Test Suite (draft 2020-12), as jsonschema's source distribution holds it.

The suite has instances of its own. For the others instances are made here: `example` fills a schema
in, `broken` spoils an example, and jsonschema says which of them are valid.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from benchmarks.grammar_tasks import task_schemas

PACKAGES = {
    "check-jsonschema==0.39.0": 1,
    "validate-pyproject-schema-store==2026.10.23": 1,
    "ansible-lint==26.10.1": 1,
    "cyclonedx-python-lib==11.12.0": 1,
    "openapi-spec-validator==0.9.0": 1,
    "nbformat==5.11.1": 2,
    "cfn-lint==1.58.0": 25,
}
"""Packages with schemas, each with a step: 1 takes all of its schemas, n every n-th."""

SUITE = "jsonschema==4.26.0"
MAX_BYTES = 256 * 1024
"""Longer schemas are left out."""

EXAMPLES, TRIES = 3, 12
STRINGS = ("a", "text", "1.0", "1.2.3", "a-b", "A1", "12345", "ABC", "https://example.com/a", "a/b")
FORMATS = {
    "date-time": "2026-01-31T12:00:00Z",
    "date": "2026-01-31",
    "time": "12:00:00Z",
    "email": "a@example.com",
    "uri": "https://example.com/a",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
    "ipv4": "192.0.2.1",
    "hostname": "example.com",
}


class Sample(NamedTuple):
    """A schema and JSON texts that it accepts and refuses; properties in the schema's order."""

    name: str
    schema: str
    valid: list[str]
    invalid: list[str]


def samples(kind: str, folder: Path) -> list[Sample]:
    """The schemas of one kind; packages are fetched by pip into `folder` once."""
    if kind == "tasks":
        return [sample(name, schema) for name, schema in task_schemas().items()]
    if kind == "suite":
        return list(_suite(_fetched(SUITE, folder, source=True)))
    return [
        sample(name, schema)
        for requirement, step in PACKAGES.items()
        for name, schema in _shipped(_fetched(requirement, folder), step)
    ]


def _fetched(requirement: str, folder: Path, *, source: bool = False) -> Path:
    home = folder / requirement
    if not home.is_dir():
        kind = "--no-binary" if source else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(home)]
        subprocess.run([*command, f"{kind}=:all:", requirement], check=True, stdout=2)
    return next(home.iterdir())


def _shipped(wheel: Path, step: int) -> Iterator[tuple[str, Any]]:
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if not member.endswith(".json") or archive.getinfo(member).file_size > MAX_BYTES:
                continue
            content = json.loads(archive.read(member))
            if isinstance(content, dict) and {"$schema", "properties"} & content.keys():
                found.append((f"{wheel.name.partition('-')[0]}: {Path(member).name}", content))
    yield from found[::step]


def _suite(archive: Path) -> Iterator[Sample]:
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            if "/tests/draft2020-12/" not in member.name or not member.name.endswith(".json"):
                continue
            file = files.extractfile(member)
            assert file is not None
            place = member.name.partition("/draft2020-12/")[2].removesuffix(".json")
            for group in json.loads(file.read()):
                texts: dict[bool, list[str]] = {True: [], False: []}
                for test in group["tests"]:
                    texts[test["valid"]].append(_text(test["data"]))
                name = f"{place}: {group['description']}"
                yield Sample(name, json.dumps(group["schema"]), texts[True], texts[False])


def sample(name: str, schema: Any) -> Sample:
    """The schema with up to EXAMPLES valid and as many invalid instances, always the same."""
    rng = random.Random(name)
    kind = validator_for(schema, Draft202012Validator)
    check = kind(schema, format_checker=kind.FORMAT_CHECKER)
    valid: list[str] = []
    invalid: list[str] = []
    for _ in range(TRIES):
        try:
            made = Examples(schema, rng).example(schema)
            spoiled = broken(made, rng)
            for instance, wanted, texts in ((made, True, valid), (spoiled, False, invalid)):
                text = _text(instance)
                if check.is_valid(instance) is wanted and text not in texts[:EXAMPLES]:
                    texts.append(text)
        except Exception:  # a schema that this module or jsonschema cannot follow has none
            break
    return Sample(name, json.dumps(schema), valid[:EXAMPLES], invalid[:EXAMPLES])


def _text(instance: Any) -> str:
    return json.dumps(instance, ensure_ascii=False)


def broken(instance: Any, rng: random.Random) -> Any:
    """A copy with one fault somewhere: a value of another type, or a property left out."""
    spoiled = copy.deepcopy(instance)
    places: list[tuple[Any, Any]] = []
    stack = [spoiled]
    while stack:
        node = stack.pop()
        keys = (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            places.append((node, key))
            stack.append(node[key])
    if not places:
        return {"unexpected": 1} if not isinstance(instance, dict) else "unexpected"
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.5:
        del node[key]
    else:
        node[key] = 0.5 if isinstance(node[key], str) else "unexpected"
    return spoiled


class Examples:
    """Fills schemas in; what comes out is often, not always, valid."""

    def __init__(self, root: Any, rng: random.Random) -> None:
        self._root, self._rng = root, rng

    def example(self, schema: Any, depth: int = 0) -> Any:
        """An instance with all required properties and, near the root, half of the others."""
        schema = self._resolved(schema)
        if schema is True or not schema or depth > 40:
            return "text"
        for key in ("const", "default"):
            if key in schema and (key == "const" or self._rng.random() < 0.2):
                return schema[key]
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        for key in ("anyOf", "oneOf"):
            if key in schema and "properties" not in schema:
                return self.example(self._rng.choice(schema[key]), depth + 1)
        kind = schema.get("type") or ("object" if "properties" in schema else "string")
        kind = self._rng.choice(kind) if isinstance(kind, list) else kind
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            count = max(schema.get("minItems", 0), self._rng.randint(0, 2) if depth < 6 else 0)
            return [self.example(schema.get("items", True), depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
            return low if kind == "integer" or self._rng.random() < 0.5 else low + 0.5
        if kind == "string":
            return self._string(schema)
        return None if kind == "null" else self._rng.random() < 0.5

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        made = {}
        for name, inner in properties.items():
            if name in required or (depth < 4 and self._rng.random() < 0.5):
                made[name] = self.example(inner, depth + 1)
        for name in required:
            if name not in properties:
                made[name] = self.example(schema.get("additionalProperties", True), depth + 1)
        return made

    def _string(self, schema: dict[str, Any]) -> str:
        known = FORMATS.get(schema.get("format", ""))
        fitting = [text for text in STRINGS if re.search(schema.get("pattern", ""), text)]
        text = known or self._rng.choice(fitting or STRINGS)
        return text.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength", 100)]

    def _resolved(self, schema: Any) -> Any:
        """What a chain of references inside of the document (`#/$defs/name`) leads to."""
        for _ in range(20):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            path = schema["$ref"].removeprefix("#/").split("/")
            schema = self._root
            for part in path:
                schema = schema[part.replace("~1", "/").replace("~0", "~")]
        return schema
