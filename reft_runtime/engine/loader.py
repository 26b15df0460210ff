"""Loads a base model, and refuses, with the reason, what the engine would get wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from reft_runtime.engine.attention import ATTENTION, LayerShape, ProbedLayer, ShapeProbe
from reft_runtime.engine.fused import fuse
from reft_runtime.engine.linears import prepack
from reft_runtime.errors import ConfigError, UnsupportedModel

SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}

PROBE_TOKENS = 8

PROBE_TOLERANCE = {4: 1e-2, 2: 0.3}
"""Relative distance of logits, by bytes of a weight: far above rounding, below any real error."""

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Capabilities of CPUs, as torch names them, that multiply bfloat16: two of x86, two of ARM."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model, ready to run packed steps.

    `layers` are the decoder layers in order, `shapes` their cache shapes, `group` the most heads
    of queries that share one of keys; `eos_ids` end an answer. `weight_bytes` is the memory of the
    weights.
    """

    model: PreTrainedModel
    architecture: str
    layers: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    group: int
    eos_ids: frozenset[int]
    hidden_size: int
    vocab_size: int
    max_model_len: int
    weight_bytes: int

    @property
    def device(self) -> torch.device:
        """Where the weights are, and keys and values."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of keys and values."""
        return self.model.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers."""
        numbers = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.shapes)
        return numbers * self.dtype.itemsize


def choose_device(name: str) -> torch.device:
    """Device by name: cpu, cuda or cuda:N."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, not {name!r}.", param="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: there is no {name}; torch sees {torch.cuda.device_count()} CUDA devices.",
            param="device",
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype by name; "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = any(capabilities.get(name, False) for name in NATIVE_BFLOAT16)
        return torch.bfloat16 if native else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, not {name!r}.", param="dtype")
    return _DTYPES[name]


def load_model(
    path: str,
    dtype: str = "auto",
    max_model_len: int | None = None,
    *,
    device: str = "cpu",
    differentiable: bool = False,
) -> LoadedModel:
    """Load a causal language model from a folder or hub id, by transformers, without remote code.

    A `differentiable` one lets gradients through to the activations: it keeps its own operators.
    Raises `UnsupportedModel` where the engine would not give the model's own tokens.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ConfigError(f"model: there is no folder {path}.", param="model")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path!r} cannot be read: {error}", param="model") from error
    _check_config(config)
    max_model_len = _chosen_length(config, max_model_len)
    place = choose_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=choose_dtype(dtype, place))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path!r} cannot be loaded: {error}", param="model") from error
    return adopt_model(
        model.to(place),  # type: ignore[arg-type]
        max_model_len,
        differentiable=differentiable,
    )


@torch.inference_mode()
def adopt_model(
    model: PreTrainedModel, max_model_len: int | None = None, *, differentiable: bool = False
) -> LoadedModel:
    """Make a model in memory ready for packed steps where it is; checks it as `load_model` does."""
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # Triton's kernels are launched on the current one
    config = model.config
    _check_config(config)
    max_model_len = _chosen_length(config, max_model_len)
    model.requires_grad_(False).train(False)
    layers = _decoder_layers(model, config.num_hidden_layers)
    probed = _probe(model)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if not differentiable:
        fuse(model, layers, probed)
        weight_bytes += prepack(model)
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = config.eos_token_id if eos is None else eos
    eos_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return LoadedModel(
        model=model,
        architecture=type(model).__name__,
        layers=layers,
        shapes=tuple(layer.shape for layer in probed),
        group=max(layer.heads // layer.shape.kv_heads for layer in probed),
        eos_ids=eos_ids,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        weight_bytes=weight_bytes,
    )


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, keep: Tensor, step: Any) -> Any:
    """Run a packed step [T] through the model; logits [len(keep), vocabulary] of the rows kept."""
    return model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=keep,
        step=step,
    ).logits[0]


def _probe(model: PreTrainedModel) -> tuple[ProbedLayer, ...]:
    """Switch the model to our attention, and see what every layer asks.

    A few tokens must give the logits that the model's own attention gives: what no rule of
    `_check_config` foresees (attention in both directions, terms of a kind we do not know) shows.
    """
    config = model.config
    positions = torch.arange(PROBE_TOKENS, device=model.device)
    ids = positions % config.vocab_size
    probe = ShapeProbe()
    try:
        model.set_attn_implementation("eager")
        own = model(input_ids=ids[None], use_cache=False).logits[0]
        model.set_attn_implementation(ATTENTION)
        packed = forward(model, ids, positions, positions, probe)
    except UnsupportedModel as error:
        raise _refuse(config, error.message) from error
    except Exception as error:
        raise _refuse(config, f"a packed forward fails: {error}") from error
    if sorted(probe.layers) != list(range(config.num_hidden_layers)):
        raise _refuse(config, "not every layer is a plain attention layer with its own KV")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == "sliding_attention" and probe.layers[layer].window is None:
            raise _refuse(config, "a sliding-window layer does not say its window")
    distance = float((packed.float() - own.float()).norm() / own.float().norm())
    if not distance < PROBE_TOLERANCE[model.dtype.itemsize]:
        raise _refuse(config, f"the engine's logits differ from its own (relative {distance:.1g})")
    return tuple(probe.layers[i] for i in range(config.num_hidden_layers))


def _check_config(config: PretrainedConfig) -> None:
    """Refuse what is known to be computed otherwise than the engine does."""
    if config.is_encoder_decoder:
        raise _refuse(config, "it is an encoder-decoder")
    if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
        raise _refuse(config, "it is multimodal; its text model alone may be served")
    if getattr(config, "kv_lora_rank", None):
        raise _refuse(config, "multi-head latent attention (MLA)")
    if getattr(config, "attn_logit_softcapping", None) or getattr(
        config, "final_logit_softcapping", None
    ):
        raise _refuse(config, "logit soft-capping")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise _refuse(config, "ALiBi position biases")
    if getattr(config, "use_bidirectional_attention", False):
        raise _refuse(config, "bidirectional attention")
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if kinds or config.model_type in ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"):
        raise _refuse(config, f"state-space or other layers ({', '.join(sorted(kinds)) or 'all'})")
    for rope in _rope_settings(config):
        if rope.get("mrope_section"):
            raise _refuse(config, "multimodal rotary positions (M-RoPE)")
        if rope.get("rope_type") == "dynamic":
            raise _refuse(config, "dynamic NTK rotary scaling, which depends on the batch's length")


def _rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Rotary settings; some models have one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _length_limit(config: PretrainedConfig) -> int:
    """Longest sequence: never past learned positions, nor past what longrope starts with."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise _refuse(config, "it does not say its maximum length (max_position_embeddings)")
    for rope in _rope_settings(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    return limit


def _chosen_length(config: PretrainedConfig, wanted: int | None) -> int:
    limit = _length_limit(config)
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise ConfigError(
            f"max_model_len must be from 1 to {limit} for this model, not {wanted}.",
            param="max_model_len",
        )
    return wanted


def _decoder_layers(model: PreTrainedModel, count: int) -> tuple[nn.Module, ...]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return tuple(module)
    raise _refuse(model.config, "its decoder layers were not found")


def _refuse(config: PretrainedConfig, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"Model type {config.model_type!r} is not supported: {reason}.")
