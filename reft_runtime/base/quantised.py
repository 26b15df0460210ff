"""Quantised bases: which of transformers' methods are served, and how many bytes weights take.

Some methods keep their weights quantised, in linear layers of their own that are used as they are.
Others are dequantised while they are read, and are ordinary models from then on.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

KEPT = ("bitsandbytes", "torchao")
"""Methods whose weights stay quantised."""

DEQUANTISED = ("compressed-tensors", "fp8", "mxfp4")
"""Methods whose weights are dequantised while they are read: there are no products with them on a
CPU, or slower ones."""

_GPTQMODEL = "its products are those of gptqmodel, which is built for one torch and one device"
_WHY_NOT = {
    "gptq": _GPTQMODEL,
    "awq": _GPTQMODEL,
    "gguf": "transformers has no products with the blocks of GGUF",
}

_THRESHOLD = 6.0
"""Of bitsandbytes' 8 bits: columns with larger numbers are multiplied without quantising them."""

_BY_BATCH = "its products (LLM.int8) depend on what other rows of a batch hold"

_OTHERWISE = (
    f"served are {' and '.join(KEPT)} and, dequantised, {', '.join(DEQUANTISED)}; or take the model"
    " that it was made from, in bfloat16 or float32"
)


def why_refused(config: PretrainedConfig) -> str | None:
    """Why a model with the weights that a configuration tells of is not served; None if it is."""
    settings = _settings(config)
    method = _method(settings)
    if not settings or (method in DEQUANTISED and settings.get("dequantize")):
        return None
    what = f"its weights are quantised ({method})"
    if settings.get("load_in_8bit") and settings.get("llm_int8_threshold", _THRESHOLD):
        return f"{what}; {_BY_BATCH}; {_OTHERWISE}"
    if method in KEPT:
        return None
    if method in DEQUANTISED:
        return f"{what}; load it with dequantize=True in its quantization_config"
    return "; ".join([what, *([_WHY_NOT[method]] if method in _WHY_NOT else []), _OTHERWISE])


def keeps_quantised(config: PretrainedConfig) -> bool:
    """Whether weights stay quantised in a model of this configuration."""
    return _method(_settings(config)) in KEPT


def ask_for_plain_weights(config: PretrainedConfig) -> None:
    """Make a configuration have its weights dequantised, if that is how they are served."""
    settings = _settings(config)
    if _method(settings) in DEQUANTISED:
        config.quantization_config = settings | {"dequantize": True}


def tell_plain(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Take from a model whose weights were dequantised what says that they are quantised.

    What is left keeps a model from being saved, or converted to another dtype. Weights that were
    dequantised to another `dtype` are converted; what transformers keeps in float32 stays, and so
    do buffers: rotary frequencies have no other dtype in any model.
    """
    whole: Any = model
    whole.hf_quantizer = None
    whole.is_quantized = False
    if not _settings(model.config):
        return
    del model.config.quantization_config
    kept = whole._get_dtype_plan(dtype)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not any(part in name for part in kept):
            weight.data = weight.data.to(dtype)


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes in memory: of a quantised one, its numbers and their scales.

    Of a weight that is split over ranks they are those of this rank's shard.
    """
    if hasattr(weight, "__tensor_flatten__"):  # torchao's, and shards
        parts = (getattr(weight, part) for part in weight.__tensor_flatten__()[0])
        return sum(stored_bytes(part) for part in parts if isinstance(part, Tensor))
    scales = [getattr(weight, "SCB", None)]  # bitsandbytes' of 8 bits
    if (state := getattr(weight, "quant_state", None)) is not None:  # and of 4
        scales += vars(state).values()
    beside = (one for one in scales if isinstance(one, Tensor))
    return sum(one.numel() * one.element_size() for one in (weight, *beside))


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    found: Any = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def _method(settings: dict[str, Any]) -> str:
    found = settings.get("quant_method") or "by an unknown method"
    return str(found.value if isinstance(found, Enum) else found).lower()
