"""Makes an intervention from a pyreft checkpoint or a live model of pyreft's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2CLS, ACT2FN

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.format.components import HIDDEN_SIZED, normalise
from reft_runtime.interventions.format.intervention import Edit, Intervention
from reft_runtime.interventions.format.kinds import ACTS, KINDS, TensorInfo, check_tensors
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.format.positions import Positions
from reft_runtime.interventions.hub import fetched
from reft_runtime.interventions.pyreft.checkpoint import Checkpoint, read_checkpoint
from reft_runtime.interventions.pyreft.classes import Stored, kind_of, tensors_of
from reft_runtime.interventions.pyreft.unpickle import plain_state
from reft_runtime.machine.dtypes import name_of

FILES = ("*config.json", "*args.json", "*intkey_*.bin")
"""What a repository of pyreft's consists of."""


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """What a checkpoint does not record; None stands for a value that is not given.

    `positions`, `share_weights` (tied), `act` and `suffix_offset` are those of the training; `kind`
    is needed if there is no config.json and the tensors fit two kinds.
    """

    positions: str | None = None
    share_weights: bool | None = None
    act: str | None = None
    suffix_offset: int | None = None
    kind: str | None = None

    def completed_by(self, args: Mapping[str, Any]) -> Unrecorded:
        """A copy in which args.json fills in what is not given. Raises `InvalidFile`."""
        found: dict[str, Any] = {}
        for name, key, types in (
            ("positions", "position", str),
            ("share_weights", "share_weights", bool),
            ("suffix_offset", "suffix_offset", int),
        ):
            if key in args and getattr(self, name) is None:
                if type(args[key]) is not types:
                    raise InvalidFile(f"args.json, {key}: must be a {types.__name__}.")
                found[name] = args[key]
        if "act_fn" in args and self.act is None:
            act = args["act_fn"]
            if act is not None and (not isinstance(act, str) or act not in ACTS):
                raise InvalidFile(f"args.json, act_fn: {str(act)[:80]!r} is no act.")
            found["act"] = act or "linear"
        return replace(self, **found)


def import_pyreft(
    source: str | Path,
    *,
    base: BaseShape,
    positions: str | None = None,
    share_weights: bool | None = None,
    act: str | None = None,
    suffix_offset: int | None = None,
    kind: str | None = None,
    template: str | None = None,
) -> Intervention:
    """Read a checkpoint: a folder, or `hf:REPO` from the Hub.

    Its pickles are read by a process of their own. `base` is the base model's shape
    (`reft_runtime.base_shape`). `positions`, `share_weights`, `act` (`linear` for none),
    `suffix_offset` (0) and `kind` are taken from args.json if it is there; see `Unrecorded`. Raises
    `ConfigError` that names what must be given, and `InvalidFile` that names what is broken or
    contradicts the tensors.
    """
    unrecorded = Unrecorded(positions, share_weights, act, suffix_offset, kind)
    for name, value, known in (("act", act, ACTS), ("kind", kind, KINDS)):
        if value is not None and value not in known:
            raise ConfigError(
                f"{name}: unknown {value[:80]!r}; known: {', '.join(sorted(known))}.", param=name
            )
    checkpoint = read_checkpoint(fetched(str(source), FILES))
    unrecorded = unrecorded.completed_by(checkpoint.args)
    kinds = [kind_of(stored, unrecorded.kind) for stored in checkpoint.interventions]
    if unrecorded.act is None and any(KINDS[kind].has_act for kind in kinds):
        raise ConfigError(
            "act: a checkpoint does not record its act_fn: give --act, `linear` for none (pyreft's"
            " default).",
            param="act",
        )
    act = None if unrecorded.act == "linear" else unrecorded.act
    acts = [act if KINDS[kind].has_act else None for kind in kinds]
    return _build(checkpoint, kinds, acts, base, unrecorded, template)


def from_live(
    reft_model: Any,
    *,
    base: BaseShape,
    positions: str,
    share_weights: bool | None = None,
    suffix_offset: int = 0,
    template: str | None = None,
) -> Intervention:
    """Make an intervention from a live `pyreft.ReftModel`, without files in between.

    `base` is the shape of its model (`reft_runtime.base_shape(reft_model.model)`). pyreft's model
    does not know `positions`, `share_weights` (needed for fN+lM only) and `suffix_offset`: give
    those of the training's data module. Raises `InvalidFile` and `ConfigError`, as `import_pyreft`
    does.
    """
    if getattr(reft_model, "_intervention_reverse_link", None):
        raise InvalidFile("intervention_link_key: linked interventions cannot be served.")
    stored, acts = [], []
    for key, module in reft_model.interventions.items():
        module = module[0] if isinstance(module, tuple) else module  # with its hook, before 0.1.7
        representation = reft_model.representations[key]
        if not getattr(module, "is_source_constant", False):
            raise InvalidFile(
                f"{key}: {type(module).__name__} takes its values from the run of another prompt,"
                " which cannot be served."
            )
        try:
            state = plain_state(module.state_dict())
        except ValueError as error:
            raise InvalidFile(f"{key}: {error}.") from None
        place = (representation.layer, representation.component)
        stored.append(Stored(key, *place, type(module).__name__, state))
        acts.append(_act_name(key, getattr(module, "act_fn", None)))
    kinds = [kind_of(each, None) for each in stored]
    unrecorded = Unrecorded(positions, share_weights, suffix_offset=suffix_offset)
    checkpoint = Checkpoint(tuple(stored), {}, ordered=True)
    return _build(checkpoint, kinds, acts, base, unrecorded, template)


def _build(
    checkpoint: Checkpoint,
    kinds: Sequence[str],
    acts: Sequence[str | None],
    base: BaseShape,
    unrecorded: Unrecorded,
    template: str | None,
) -> Intervention:
    edits = []
    where = _positions(unrecorded, len(kinds), ordered=checkpoint.ordered)
    for stored, kind, act, positions in zip(
        checkpoint.interventions, kinds, acts, where, strict=True
    ):
        tensors = tensors_of(stored, kind, act)
        layer, component = normalise(stored.layer, stored.component)
        if layer >= base.num_layers:
            raise InvalidFile(
                f"{stored.where}: layer {layer}, but {base.model} has layers 0 to"
                f" {base.num_layers - 1}; check --base."
            )
        width = base.hidden_size
        if component not in HIDDEN_SIZED:
            width = _width(kind, tensors) or width
        _check(stored, kind, tensors, width)
        edits.append(
            Edit(
                layer,
                positions,
                tensors,
                kind,
                component,
                act,
                None if width == base.hidden_size else width,
                unrecorded.suffix_offset or 0,
            )
        )
    return Intervention.build(base, edits, template=template, training={"source": "pyreft"})


def _positions(unrecorded: Unrecorded, count: int, *, ordered: bool) -> list[str]:
    """Positions of each of `count` interventions, assigned as pyreft's data sets do."""
    text = unrecorded.positions
    if text is None:
        raise ConfigError(
            "positions: a checkpoint does not record them: give --positions, such as f3+l3.",
            param="positions",
        )
    whole = Positions.parse(text)
    if not (whole.first and whole.last):
        return [text] * count  # one list for all, whatever share_weights says
    if unrecorded.share_weights is None:
        raise ConfigError(
            "share_weights: a checkpoint does not record whether the interventions at the first and"
            " at the last tokens share their weights: give --share-weights or --untied.",
            param="share_weights",
        )
    if unrecorded.share_weights:
        return [text] * count
    if count % 2:
        raise InvalidFile(
            f"share_weights: {count} interventions cannot be untied, which takes as many for the"
            " first tokens as for the last; give --share-weights."
        )
    if whole != Positions(whole.first, whole.last):
        raise InvalidFile(f"positions: untied weights take fN+lM, not {text!r}.")
    if not ordered:
        raise InvalidFile(
            "share_weights: without a config.json the names must tell which interventions are for"
            " the first tokens (#0) and which for the last (#1), and these do not."
        )
    half = count // 2
    return [f"f{whole.first}"] * half + [f"l{whole.last}"] * half


def _width(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    for name, spec in KINDS[kind].tensors.items():
        if name in tensors and "d" in spec.shape and tensors[name].ndim == len(spec.shape):
            return tensors[name].shape[spec.shape.index("d")]
    return None


def _check(stored: Stored, kind: str, tensors: Mapping[str, Tensor], width: int) -> None:
    infos = {
        name: TensorInfo(name_of(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    specs = KINDS[kind].tensors
    dtypes = [info.dtype for name, info in infos.items() if not specs[name].orthonormal]
    check_tensors(kind, f"{stored.where}: ", infos, dtype=dtypes[0], width=width)
    if stored.width not in (None, width):
        raise InvalidFile(
            f"{stored.where}: config.json says {stored.width} dimensions, its tensors have {width}."
        )


def _act_name(key: str, module: Any) -> str | None:
    """The name of an act that a live intervention holds as a module."""
    if module is None:
        return None
    module, grid = copy.deepcopy(module).cpu(), torch.linspace(-12, 12, 97)
    for name in ("linear", *ACT2CLS):
        candidate = ACT2FN[name]
        if type(candidate) is type(module) and torch.equal(candidate(grid), module(grid)):
            return str(name)
    raise InvalidFile(f"{key}: act_fn is none of transformers' ACT2FN as it starts.")
