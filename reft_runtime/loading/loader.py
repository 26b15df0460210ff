"""Loads a base model, and refuses, with the reason, a model that the engine would get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.attention import ATTENTION, NO_ATTENTION, Scoring
from reft_runtime.base.delta_rule import fuse_delta_nets
from reft_runtime.base.experts import pack_experts
from reft_runtime.base.fused import Fused, fuse
from reft_runtime.base.generation import ends_of_answers, tell_ignored
from reft_runtime.base.language import language_model
from reft_runtime.base.linears import Packed, prepack
from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.base.own_attention import lead_to_step
from reft_runtime.base.ownership import ModelState
from reft_runtime.base.pretrained import read_config, read_model
from reft_runtime.base.probe import PROBE, AskedMask, ProbedLayer
from reft_runtime.base.quantised import stored_bytes
from reft_runtime.base.recurrent import StateProbe, find_mixers, run_by_step
from reft_runtime.base.shared import tell_layers
from reft_runtime.base.stages import stage
from reft_runtime.base.support import TUNED, check_config, chosen_length, refuse
from reft_runtime.base.time_steps import bound_time_steps
from reft_runtime.errors import ConfigError, UnsupportedModel
from reft_runtime.loading.fidelity import check, own_logits
from reft_runtime.loading.latents import keep_latents
from reft_runtime.machine.contention import StepWatch
from reft_runtime.machine.dtypes import DTYPES, name_of
from reft_runtime.machine.memory import is_out_of_memory

PROBE_TOKENS = 8

WATCHED_SECONDS = 0.2
"""After so long a time in layers fewer threads compute if they waited for cores: a model's own
forward has many small operators, and each may wait for a worker that does not run."""

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Capabilities of CPUs, by torch's names, that multiply bfloat16: two of x86, two of ARM."""


def choose_device(name: str) -> torch.device:
    """The device of a name: cpu, cuda or cuda:N. Raises `ConfigError`."""
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
    """The dtype of a name; "auto" is bfloat16 if the device multiplies it natively, else float32.

    Raises `ConfigError`.
    """
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = any(capabilities.get(name, False) for name in NATIVE_BFLOAT16)
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}.", param="dtype")
    return DTYPES[name]


def load_model(
    path: str,
    dtype: str = "auto",
    max_model_len: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    differentiable: bool = False,
    ranks: int = 1,
) -> LoadedModel:
    """Load a causal language model from a folder or hub id, by transformers, without remote code.

    `tokenizer` is the model's; its end of sequence ends an answer too. A `differentiable` model
    lets gradients through to the activations and so keeps its own operators. With several `ranks`,
    this is the shard of one of them, and all load theirs at the same time (see `parallel`). Raises
    `ConfigError` if the folder cannot be read or not all weights come from it, and
    `UnsupportedModel` if the engine would not give the model's own tokens.
    """
    config = read_config(path)
    check_config(config)
    max_model_len = chosen_length(config, max_model_len)
    place = choose_device(device)
    with stage("Loading the weights"):
        model = read_model(path, choose_dtype(dtype, place), ranks=ranks)
        if ranks == 1:
            model.to(place)  # type: ignore[arg-type]
    return adopt_model(
        model,
        max_model_len,
        tokenizer=tokenizer,
        differentiable=differentiable,
        ranks=ranks,
    )


@torch.inference_mode()
def adopt_model(
    model: PreTrainedModel,
    max_model_len: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    differentiable: bool = False,
    ranks: int = 1,
) -> LoadedModel:
    """Make a model in memory ready for packed steps where it is; checked as by `load_model`.

    Of a model that also sees or hears its language model is taken, with the modules themselves. A
    shard, of several `ranks`, keeps its own operators: they add up what the ranks compute.
    `LoadedModel.give_back` restores the model; so does an exception.
    """
    model = language_model(model)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # Triton's kernels are launched on the current one
    config = model.config
    check_config(config)
    if model.dtype not in DTYPES.values():
        raise refuse(
            config,
            f"its weights are in {name_of(model.dtype)}; convert it to {', '.join(DTYPES)}",
        )
    max_model_len = chosen_length(config, max_model_len)
    layers = _decoder_layers(model, config.num_hidden_layers)
    before = ModelState(model)
    threads = torch.get_num_threads()
    try:
        model.requires_grad_(False).train(False)
        mixers = find_mixers(model)
        run_by_step(mixers)
        bound_time_steps(mixers)
        tell_layers(model)
        lead_to_step(model)
        with stage("Asking the model for its own logits"):
            probed, probe = _probe(model, max_model_len, mixers)
            with _failing("its own forward fails"), _yielding_cores(layers, model.device):
                own = own_logits(model, layers, probed, max_model_len)
        model.set_attn_implementation(ATTENTION)
        for module in model.modules():
            if getattr(module, TUNED, False):
                setattr(module, TUNED, False)  # see `support.chosen_length`
        weight_bytes = sum(map(stored_bytes, model.parameters()))
        fused, packed = Fused(), Packed()
        if not differentiable and ranks == 1:
            # Not in inference mode: outside the engine, packed weights may meet gradients.
            with stage("Packing the weights"), torch.inference_mode(mode=False), torch.no_grad():
                fused = fuse(model, layers, probed)
                fuse_delta_nets(mixers, probe.states, probe.read, model.device)
                probed, unused = keep_latents(model, probed)
                packed = prepack(model, {*unused, *probe.read})
                packed = replace(packed, experts=pack_experts(model))
        loaded = LoadedModel(
            model=model,
            architecture=type(model).__name__,
            layers=layers,
            shapes=tuple(layer.shape for layer in probed),
            group=max(1, *(layer.heads // max(1, layer.shape.kv_heads) for layer in probed)),
            mixers=mixers,
            states=tuple(probe.states[number] for number in range(len(mixers))),
            eos_ids=ends_of_answers(model, tokenizer),
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            weight_bytes=weight_bytes + packed.added_bytes,
            fused=fused,
            packed=packed,
            before=before,
            ranks=ranks,
        )
        with stage("Checking what will be served"), _failing("a packed forward fails"):
            loaded = replace(loaded, distance=check(loaded, own, probed))
    except UnsupportedModel as error:
        before.restore()
        raise refuse(config, error.message) from error
    except BaseException:
        before.restore()
        raise
    finally:
        torch.set_num_threads(threads)
    tell_ignored(model)
    return loaded


@contextmanager
def _yielding_cores(layers: tuple[nn.Module, ...], device: torch.device) -> Iterator[None]:
    """From the first layers that wait for cores on, let this thread compute with fewer threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    watch = StepWatch(threads, torch.set_num_threads, window=WATCHED_SECONDS, quiet=True)
    with ExitStack() as hooks:
        for layer in layers:
            step = ExitStack()
            begin = layer.register_forward_pre_hook(
                lambda *_, step=step: step.enter_context(watch.step())
            )
            end = layer.register_forward_hook(lambda *_, step=step: step.close())
            hooks.callback(begin.remove)
            hooks.callback(end.remove)
        yield


def _probe(
    model: PreTrainedModel, max_tokens: int, mixers: tuple[nn.Module, ...]
) -> tuple[tuple[ProbedLayer, ...], StateProbe]:
    """Record what every layer asks of attention, and the states of every mixer.

    Windows are kept as attributes of the modules.
    """
    config = model.config
    positions = torch.arange(min(PROBE_TOKENS, max_tokens), device=model.device)
    probe = StateProbe(max_tokens, model.dtype, mixers)
    model.set_attn_implementation(PROBE)
    with _failing("a packed forward fails"):
        forward(model, positions % config.vocab_size, positions, positions, probe)
    if not probe.layers and not mixers:
        raise UnsupportedModel("its attention does not go through transformers' interface")
    layers = range(config.num_hidden_layers)
    if not mixers and sorted(probe.layers) != list(layers):
        raise UnsupportedModel(
            "not every layer is a plain attention layer with its own KV, or a recurrent one that"
            " keeps its states in transformers' cache"
        )
    if not probe.layers.keys() <= set(layers):
        raise UnsupportedModel("it attends in more layers than it has")
    if len(probe.states) != len(mixers):
        raise UnsupportedModel("not all of its recurrent layers run")
    none = ProbedLayer(NO_ATTENTION, 0, Scoring())
    return tuple(probe.layers.get(layer, none) for layer in layers), probe


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Make a refusal of whatever a model's code raises, unless memory has run out."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if AskedMask.__name__ in str(error):
            raise UnsupportedModel("its own code changes attention masks") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnsupportedModel(f"{what}: {reason[:200]}") from error


def _decoder_layers(model: PreTrainedModel, count: int) -> tuple[nn.Module, ...]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return tuple(module)
    raise refuse(model.config, "its decoder layers were not found")
