"""PEFT's adapters that edit activations: IA3, BEFT, HRA, LN tuning. Others are refused by name.

Each acts at every token, at the input or the output of the modules that it is named for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.folders import CONFIG, field, read_config, read_weights
from reft_runtime.interventions.foreign.modules import by_module, edit_at
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape

FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Where the weights are: the first one that is there."""

_PREFIX = "base_model.model."

_LORAS = frozenset({"LORA", "ADALORA", "XLORA", "POLY"})
_WEIGHTS = frozenset(
    {
        "ADAMSS", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA",
        "HIRA", "LILY", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA",
        "RANDLORA", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
_PROMPTS = frozenset(
    {
        "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING",
        "PREFIX_TUNING", "PROMPT_TUNING",
    }
)  # fmt: skip
_CHANGES = (
    "changes weights: what it adds depends on the input of a module, and no edit stands for it"
)
_REASONS = {
    **dict.fromkeys(_LORAS, f"is a LoRA, which {_CHANGES}; docs/from-lora.md says what to do"),
    **dict.fromkeys(_WEIGHTS, _CHANGES),
    **dict.fromkeys(_PROMPTS, "puts learned vectors before the prompt, and edits no hidden states"),
    "ROAD": "turns all dimensions of a row in pairs, which is of no low rank",
    "SHADOW": "runs a second network beside the model",
    "TRAINABLE_TOKENS": "changes the embeddings of tokens",
}

_IRRELEVANT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
        "feedforward_modules", "inference_mode", "init_ia3_weights", "init_weights",
        "layers_pattern", "layers_to_transform", "peft_type", "peft_version", "revision",
        "target_modules", "task_type",
    }
)  # fmt: skip
"""Fields that say how the adapter was made, or which modules it has, as its weights do."""


_Made = tuple[str, str, dict[str, Tensor]]


class _Tuner(NamedTuple):
    """How one method's weights are named, the fields it has, and the edit that they make.

    `edit` takes them by name, the configuration and what reads the base model's own module. It
    gives the side of the module, a kind and its tensors; it raises `ValueError` with the shape that
    it expects.
    """

    weights: tuple[str, ...]
    edit: Callable[[Mapping[str, Tensor], Mapping[str, Any], Callable[[], nn.Module]], _Made]
    fields: frozenset[str] = frozenset()


def import_peft(
    source: str | Path,
    *,
    base: BaseShape,
    modules: Callable[[str], nn.Module] | None = None,
    positions: str | None = None,
    template: str | None = None,
) -> Intervention:
    """Read a folder that `save_pretrained` wrote, or one of the files in it.

    `positions` are `all` unless others are given. A pickle is read by a process of its own. `base`
    is the base model's shape (`reft_runtime.base_shape`), and `modules` reads its norms, which LN
    tuning replaces. Raises `ConfigError` and `InvalidFile`.
    """
    path = Path(source)
    config = read_config(path)
    method = field(config, "peft_type", str)
    if method not in _TUNERS:
        reason = _REASONS.get(method, f"is unknown; {', '.join(_TUNERS)} can be read")
        raise InvalidFile(f"{path}: {CONFIG}, peft_type: {method[:80]} {reason}.")
    tuner = _TUNERS[method]
    _check(config, tuner)
    edits = []
    weights = read_weights(path, FILES)
    for module, found in by_module(weights, tuner.weights, method, _PREFIX).items():
        try:
            side, kind, tensors = tuner.edit(found, config, partial(_own, modules, module))
        except ValueError as error:
            name, tensor = next(iter(found.items()))
            raise InvalidFile(
                f"{module[:200]}.{name}: shape {list(tensor.shape)}, expected {error}."
            ) from None
        edits.append(edit_at(base, positions, f"{module}.{side}", kind, tensors))
    edits.sort(key=lambda edit: edit.layer)
    training = {"source": "PEFT", "method": method}
    return Intervention.build(base, edits, template=template, training=training)


def _check(config: Mapping[str, Any], tuner: _Tuner) -> None:
    """Raise `InvalidFile` for a field that says that there is more than the tuner's weights."""
    for name, value in config.items():
        if name in _IRRELEVANT | tuner.fields or value in (None, False, "none", [], {}):
            continue
        if name == "modules_to_save":
            why = "these modules were trained, too, and only edits can be served"
        elif name == "bias":
            why = "biases of the base model were trained, too; only none can be served"
        else:
            why = "nothing that is known here, and it could change what the adapter does"
        raise InvalidFile(f"{CONFIG}, {name[:80]}: {str(value)[:80]!r}: {why}.")


def _own(modules: Callable[[str], nn.Module] | None, path: str) -> nn.Module:
    if modules is None:
        raise ConfigError(
            "modules: LN tuning replaces norms of the base model: give"
            " reft_runtime.base.stored.StoredModules(MODEL).",
            param="modules",
        )
    return modules(path)


def _ia3(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], own: Callable[[], nn.Module]
) -> _Made:
    tensor = weights["ia3_l"]
    # On attention's modules [out, 1], of their output; on feedforward ones [1, in], of their input.
    if tensor.ndim != 2 or 1 not in tensor.shape:
        raise ValueError("[out, 1] or [1, in]")
    side = "output" if tensor.shape[1] == 1 else "input"
    gain = tensor.flatten()
    return side, "red", {"s": gain, "b": torch.zeros_like(gain)}


def _beft(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], own: Callable[[], nn.Module]
) -> _Made:
    tensor = weights["beft_bias"]
    if tensor.ndim != 2 or tensor.shape[0] != 1:
        raise ValueError("[1, out]")
    return "output", "steering", {"v": tensor.flatten()}


def _hra(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], own: Callable[[], nn.Module]
) -> _Made:
    """Householder reflections of a module's input, as I - U T Uᵀ with a triangular T [r, r].

    W (I - 2 u₁u₁ᵀ) ... (I - 2 uᵣuᵣᵀ) is applied to the input, so that rows are multiplied by the
    transpose. With `apply_GS` the u are made orthonormal first, and T is 2 I.
    """
    tensor, rank = weights["hra_u"], field(config, "r", int)
    if tensor.ndim != 2 or tensor.shape[1] != rank or not 1 <= rank <= tensor.shape[0]:
        raise ValueError(f"[in, r={rank}]")
    U, T = tensor.double().clone(), torch.zeros(rank, rank, dtype=torch.float64)
    gram_schmidt = field(config, "apply_GS", bool)
    for i in range(rank):
        if gram_schmidt:
            for j in range(i):
                U[:, i] -= (U[:, j] @ U[:, i]) * U[:, j]
        U[:, i] /= U[:, i].norm()
        T[:i, i] = -2 * T[:i, :i] @ (U[:, :i].T @ U[:, i])
        T[i, i] = 2
    W, W2 = U.T.float().contiguous(), -(T.T @ U.T).float().contiguous()
    return "input", "nodireft", {"W": W, "W2": W2}


def _ln(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], own: Callable[[], nn.Module]
) -> _Made:
    """The gain and offset that make of a norm's output that of the norm with other weights.

    Both are g * x + b in terms of the normed x, which -x gives the other sign: so the norm itself
    says what its weights mean (some add 1 to them).
    """
    module = own()
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ValueError(", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))
    width = next(iter(shapes.values()))[-1]
    x = torch.linspace(1, 2, width) * (1 - 2 * (torch.arange(width) % 2))
    parts = []
    with torch.no_grad():
        for state in (module.state_dict(), weights):
            wide = {name: tensor.float() for name, tensor in state.items()}
            up, down = (functional_call(module, wide, (row[None],))[0] for row in (x, -x))
            parts.append(((up - down) / 2, (up + down) / 2))
    (g, b), (new_g, new_b) = parts
    if not bool(g.all()):
        raise InvalidFile(
            f"peft_type: LN_TUNING: a norm of the base model is 0 at {int((g == 0).sum())} of"
            f" {width} places, where no gain stands for another weight."
        )
    s = new_g / g
    return "output", "red", {"s": s, "b": new_b - s * b}


_TUNERS = {
    "IA3": _Tuner(("ia3_l",), _ia3),
    "BEFT": _Tuner(("beft_bias",), _beft),
    "HRA": _Tuner(("hra_u",), _hra, frozenset({"r", "apply_GS"})),
    "LN_TUNING": _Tuner(("ln_tuning_layers.weight", "ln_tuning_layers.bias"), _ln),
}
