"""Which interventions a request means, and how prompts are written for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reft_runtime.errors import NotFound, did_you_mean
from reft_runtime.front.prompt_form import PromptForm
from reft_runtime.use import Use
from server.schemas.common import InterventionUse

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine
    from reft_runtime.interventions import Version


@dataclass(frozen=True, slots=True)
class Selection:
    """Exact versions to apply, in order, and how prompts are written for them.

    `uses` hold versions and not names: a name that is replaced meanwhile cannot give one request
    two versions. `names` are the same by name, `form` is how their prompts are written. `label` is
    how an answer calls what is applied: as the request did, or, where it gave `interventions`, by
    their names.
    """

    label: str
    uses: tuple[Use, ...] = ()
    names: tuple[str, ...] = ()
    form: PromptForm = field(default_factory=PromptForm)


def select(engine: Engine, model: str, uses: Sequence[InterventionUse] = ()) -> Selection:
    """Resolve `model`, or `uses` where given, in the registry, their tensors read from the disk.

    `model` is the base's id, NAME, NAME@DIGEST or BASE:NAME. Raises `NotFound` for an unknown one.
    """
    base = engine.info.model
    named = None if model == base else model.removeprefix(f"{base}:")
    wanted = list(uses)
    if not uses and named is not None:
        wanted = [InterventionUse.model_construct(name=named)]
    if named is not None:
        try:
            engine.registry.resolve(named)
        except NotFound:
            meant = engine.registry.meant(named) or did_you_mean(named, [base])
            raise NotFound(f"The model `{model}` does not exist.{meant}", param="model") from None
    resolved: list[Use] = []
    names: list[str] = []
    strengths: list[tuple[Version, float]] = []
    for position, use in enumerate(wanted):
        try:
            version = engine.registry.ready(use.name)
        except NotFound:
            raise NotFound(
                f"The intervention `{use.name}` does not exist.{engine.registry.meant(use.name)}",
                param=f"interventions.{position}.name",
            ) from None
        subspace = None if use.subspace is None else tuple(use.subspace)
        resolved.append(Use(version, use.strength, subspace))
        names.append(version.name)
        strengths.append((version, use.strength))
    label = "+".join(map(_label, wanted)) if uses else model
    return Selection(label, tuple(resolved), tuple(names), PromptForm.of(strengths))


def _label(use: InterventionUse) -> str:
    return use.name if use.strength == 1 else f"{use.name}*{use.strength:g}"
