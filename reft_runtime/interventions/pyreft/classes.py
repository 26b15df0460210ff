"""Maps pyreft's classes of interventions and their state dicts to kinds of edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.format.kinds import KINDS
from reft_runtime.interventions.pyreft.unpickle import PLAIN

CLASSES = {
    "LoreftIntervention": "loreft",
    "LoreftIntervention_IdentityInit": "loreft",
    "NoreftIntervention": "noreft",
    "DireftIntervention": "direft",
    "NodireftIntervention": "nodireft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
    "AdditionIntervention": "steering",
}

# For every kind, its tensors' names here and their keys in the state dict.
_LINEAR = {"W": "learned_source.weight", "b": "learned_source.bias"}
_KEYS: Mapping[str, Mapping[str, str]] = {
    "loreft": {"W": "weight", "b": "bias", "R": PLAIN},
    "noreft": {**_LINEAR, "W2": "proj_layer.weight", "b2": "proj_layer.bias"},
    "nodireft": {**_LINEAR, "W2": "proj_layer.weight"},
    "direft": {**_LINEAR, "R": PLAIN},
    "consreft": {"c": "learned_source", "R": PLAIN},
    "lobireft": {"c": "learned_source", "R": PLAIN},
    "steering": {"v": "source_representation"},
}
# Other keys that a state dict may have: sizes, and a bias that Nodireft saves but does not use.
_IGNORED = {"embed_dim", "interchange_dim"}
_UNUSED = {"nodireft": {"proj_layer.bias"}}


@dataclass(frozen=True, slots=True)
class Stored:
    """One intervention of a checkpoint.

    `where` names it in messages; `class_name` and `width` are None if the checkpoint does not say.
    `state` holds R as a plain matrix, not parametrised.
    """

    where: str
    layer: int
    component: str
    class_name: str | None
    state: Mapping[str, Tensor]
    width: int | None = None


def kind_of(stored: Stored, given: str | None) -> str:
    """The kind of a stored intervention: by its class, else by its tensors, else `given`.

    Raises `InvalidFile` for a class that cannot be served, or that contradicts `given`.
    """
    if stored.class_name is not None:
        kind = CLASSES.get(stored.class_name)
        if kind is None:
            raise InvalidFile(
                f"{stored.where}: {stored.class_name[:80]} cannot be served; known are"
                f" {', '.join(CLASSES)}."
            )
        if given not in (None, kind):
            raise InvalidFile(f"{stored.where}: a {stored.class_name} is {kind}, not {given}.")
        return kind
    keys = stored.state.keys()
    fitting = [
        kind
        for kind, names in _KEYS.items()
        if all(
            names[name] in keys for name, spec in KINDS[kind].tensors.items() if not spec.optional
        )
    ]
    if given is not None and given in fitting:
        return given
    if given is not None or not fitting:
        instead = "" if given is None else f", not {given}"
        raise InvalidFile(
            f"{stored.where}: the tensors {', '.join(sorted(keys))[:300]} are those of"
            f" {' or '.join(fitting) or 'no known kind'}{instead}."
        )
    if len(fitting) > 1:
        raise ConfigError(
            f"{stored.where}: the tensors are those of {' or '.join(fitting)}, and the checkpoint"
            " does not say which: give --kind.",
            param="kind",
        )
    return fitting[0]


def tensors_of(stored: Stored, kind: str, act: str | None) -> dict[str, Tensor]:
    """The tensors of a stored intervention by the names they have here.

    Raises `InvalidFile` for a key that is not the kind's, and for an act whose trained parameters
    differ from those that it starts with, because no file here holds them.
    """
    state = dict(stored.state)
    tensors = {name: state.pop(key) for name, key in _KEYS[kind].items() if key in state}
    for key in _IGNORED | _UNUSED.get(kind, set()):
        state.pop(key, None)
    learned = {key.removeprefix("act_fn."): state.pop(key) for key in [*state] if "act_fn." in key}
    if learned and not same_state(learned, act):
        raise InvalidFile(
            f"{stored.where}: act_fn has trained parameters, which are not supported."
        )
    if state:
        raise InvalidFile(f"{stored.where}: {min(state)[:80]}: a {kind} has no such tensor.")
    if "v" in tensors:  # stored with leading dimensions of size 1, or none
        tensors["v"] = tensors["v"].flatten()
    return tensors


def same_state(learned: Mapping[str, Tensor], act: str | None) -> bool:
    """Whether the learned parameters are those that an act starts with."""
    fresh = ACT2FN[act or "linear"].state_dict()
    return fresh.keys() == learned.keys() and all(
        torch.equal(fresh[key].float(), value.float()) for key, value in learned.items()
    )


def state_of(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an edit, with R plain and missing biases zero: undoes `tensors_of`."""
    keys = _KEYS[kind]
    state = {keys[name]: tensor for name, tensor in tensors.items()}
    if "W" in tensors and "b" not in tensors:
        W = tensors["W"]
        state[keys["b"]] = W.new_zeros(W.shape[0])
    return state


def exportable(kind: str) -> bool:
    """Whether pyreft or pyvene has a class for a kind."""
    return kind in _KEYS
