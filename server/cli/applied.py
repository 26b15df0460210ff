"""A command's engine, and what `--intervention` means: names in its registry, and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.interventions.format.identity import names_file
from reft_runtime.use import Use
from server.cli.local_files import naming, read_file

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine
    from reft_runtime.interventions import Version


Asked = tuple[Use, bytes | None]
"""What an option says, and the content of the file that it names, None where it is a name."""


def read_asked(options: Sequence[str], model: str) -> list[Asked]:
    """Read the options' values, and check the files among them, before the base is loaded.

    Raises `InvalidRequest` (a strength), `NotFound`, `InvalidFile` and `WrongBaseModel`.
    """
    uses = [Use.parse(option) for option in options]
    return [(use, _read(use, model) if names_file(use.label) else None) for use in uses]


def resolve(engine: Engine, asked: Sequence[Asked]) -> list[Use]:
    """Exact versions to apply, in order; raises `NotFound` that says which names may be meant."""
    uses = []
    for use, data in asked:
        if data is None:
            version = _version(engine, use.label)
        else:
            file = Path(use.label)
            with naming(file):
                version = engine.registry.verified(file.stem, data)
        uses.append(Use(version, use.strength))
    return uses


@contextmanager
def telling_templates() -> Iterator[None]:
    """Say of chat templates that differ what a command's user can do."""
    try:
        yield
    except InvalidRequest as error:
        if error.param != "interventions":
            raise
        raise InvalidRequest(
            "--intervention: the chat templates of these differ, or what they do with a system "
            "turn; lay out the prompt yourself, with --raw.",
            param="intervention",
        ) from None


def _read(use: Use, model: str) -> bytes:
    file = Path(use.label)
    with naming(file):
        data = read_file(file)
    from reft_runtime.base.shape import base_shape
    from reft_runtime.interventions import parse
    from reft_runtime.interventions.format.manifest import check_base

    with naming(file):
        intervention = parse(data)
        intervention.canonical()
        check_base(intervention.manifest, base_shape(model))
    return data


def _version(engine: Engine, ref: str) -> Version:
    try:
        return engine.registry.resolve(ref)
    except NotFound:
        name = ref.partition("@")[0]
        for path, why in engine.registry.unserved().items():
            if Path(path).stem == name:
                raise NotFound(
                    f"--intervention: {path} is not served: {why}", param="intervention"
                ) from None
        names = [entry.name for entry in engine.registry.entries()]
        meant = engine.registry.meant(ref) or f" There are: {', '.join(names) or 'none'}."
        if Path(f"{name}.safetensors").is_file():
            meant = f" For the file in this folder give ./{name}.safetensors."
        raise NotFound(
            f"--intervention: there is no {ref!r}.{meant}", param="intervention"
        ) from None
