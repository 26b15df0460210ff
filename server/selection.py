"""Which interventions a request means, and which chat template comes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.nearest import did_you_mean
from reft_runtime.use import Use, completion_prefix
from server.schemas.common import InterventionUse

if TYPE_CHECKING:
    from reft_runtime.interventions import Version
    from reft_runtime.interventions.manifest import SystemTurn
    from reft_runtime.llm import Engine
    from reft_runtime.text import ChatOptions, Message, Tokenizer


@dataclass(frozen=True, slots=True)
class Selection:
    """Exact versions to apply, in order, and the chat template they agree on.

    `uses` hold versions and not names: a name that is replaced meanwhile cannot give one request
    two versions. `names` are the same by name. `template` None is the base model's own, and
    `system` is what a text template does with a system turn; `completion_prefix` what answers
    begin with that is not shown, and prompts do not end with. `label` is how an answer calls what
    is applied: as the request did, or, where it gave `interventions`, by their names.
    """

    label: str
    uses: tuple[Use, ...] = ()
    names: tuple[str, ...] = ()
    template: str | None = None
    system: SystemTurn = "prepend"
    completion_prefix: str = ""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        options: ChatOptions,
        *,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        """Token ids of a chat under the template."""
        return tokenizer.encode_chat(
            messages,
            self.template,
            system=self.system,
            completion_prefix=self.completion_prefix,
            options=options,
            add_special_tokens=add_special_tokens,
        )


def select(engine: Engine, model: str, uses: Sequence[InterventionUse] = ()) -> Selection:
    """Resolve `model`, or `uses` where given, in the registry, their tensors read from the disk.

    `model` is the base's id, NAME, NAME@DIGEST or BASE:NAME. Raises `NotFound` for an unknown one
    and `InvalidRequest` where interventions bring templates that differ.
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
    templates: dict[tuple[str, SystemTurn], str] = {}
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
        if version.template is not None:
            templates[version.template, version.system_turn] = version.name
    if len(templates) > 1:
        raise InvalidRequest(
            f"The chat templates of {' and '.join(templates.values())}, or what they do with a "
            "system turn, differ; "
            "use /v1/completions to lay out the prompt yourself.",
            param="interventions",
        )
    none: tuple[str | None, SystemTurn] = (None, "prepend")
    template, system = next(iter(templates), none)
    label = "+".join(map(_label, wanted)) if uses else model
    prefix = completion_prefix(strengths)
    return Selection(label, tuple(resolved), tuple(names), template, system, prefix)


def _label(use: InterventionUse) -> str:
    return use.name if use.strength == 1 else f"{use.name}*{use.strength:g}"
