"""Quantised bases: their linear layers stay theirs, or they are dequantised or refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from reft_runtime.base.fused import Fused
from reft_runtime.base.pretrained import _stored_as_integers, read_model
from reft_runtime.base.quantised import stored_bytes, tell_plain
from reft_runtime.errors import ConfigError, UnsupportedModel
from reft_runtime.interventions.format.file import read_header
from reft_runtime.loading.loader import adopt_model, load_model
from reft_runtime.training import TrainSettings, train
from tests.helpers.models import (
    applied,
    generate,
    generate_edited,
    loreft,
    make_core,
    prompt,
    request,
    run,
    tiny,
)
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS

WEIGHTS = "model.safetensors"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    tiny("llama", eos_token_id=2).save_pretrained(folder)
    return folder


def configured(folder: Path, **quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def int8(plain: Path, tmp_path: Path) -> Path:
    """A folder whose linear layers torchao has quantised to int8, each row with a scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        folder = tmp_path / "int8"
        AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=torch.float32,
            quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        ).save_pretrained(folder)
    return folder


def own(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, num_beams=1
    )
    return model


def fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Quantise a folder's linear layers in blocks, as DeepSeek V3's; returns what they mean."""
    weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    meant = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / torch.finfo(torch.float8_e4m3fn).max
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        meant[name] = weights[name].float() * scale
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    configured(folder, quant_method="fp8", weight_block_size=[128, 128])
    return meant


@pytest.mark.filterwarnings("ignore")
class TestKept:
    """torchao: weights stay int8, and the model's own products with them are used."""

    def test_tokens_are_the_models_own(self, int8: Path) -> None:
        model, loaded = own(int8), load_model(str(int8), "float32")
        edits = (loreft(1, "f2+l2"), loreft(2, "l1", seed=1))
        tokens = {length: prompt(length) for length in (1, 5, 40)}
        core = make_core(loaded, max_step_tokens=16)
        asked = [request(str(n), ids) for n, ids in tokens.items()]
        asked += [request(f"edited {n}", ids, applied(*edits)) for n, ids in tokens.items()]
        found = run(core, asked)
        decoders = model.get_submodule("model.layers")
        for n, ids in tokens.items():
            assert found[str(n)][0] == generate(model, ids)
            wanted = generate_edited(model, list(decoders), ids, [(e, 1.0) for e in edits])  # type: ignore[call-overload]
            assert found[f"edited {n}"][0] == wanted

    def test_linear_layers_stay_theirs(self, int8: Path, plain: Path) -> None:
        loaded, before = load_model(str(int8), "float32"), load_model(str(plain), "float32")
        for layer in loaded.layers:
            for name in ("self_attn.q_proj", "mlp.down_proj"):
                linear = layer.get_submodule(name)
                assert type(linear.weight).__name__ == "Int8Tensor"
                assert "forward" not in vars(linear)
        assert (loaded.packed.layers, loaded.fused.whole) == (1, 0)  # the head is not quantised
        assert before.fused == Fused() or before.fused.whole == 4
        # One byte for a number, and a scale for a row.
        linears = [m for m in before.model.modules() if isinstance(m, torch.nn.Linear)]
        rows = sum(linear.out_features for linear in linears[:-1])
        numbers = sum(linear.in_features * linear.out_features for linear in linears[:-1])
        saved = before.weight_bytes - loaded.weight_bytes
        assert 3 * numbers - 8 * rows <= saved <= 3 * numbers - 4 * rows

    def test_training(self, int8: Path, tmp_path: Path) -> None:
        file = tmp_path / "task.safetensors"
        settings = TrainSettings(steps=3, layers=(1,), rank=2)
        before = own(int8)
        train(
            *(ROWS, file),
            settings=settings,
            model=before,
            tokenizer=tiny_tokenizer(),
            progress=False,
        )
        assert read_header(file).manifest.base.architecture == "LlamaForCausalLM"
        assert generate(before, prompt(9)) == generate(own(int8), prompt(9))  # given back


def test_blocks_of_float8_are_dequantised(plain: Path) -> None:
    meant = fp8(plain)
    loaded = load_model(str(plain), "float32")
    tokens = run(make_core(loaded), [request("a", prompt(20))])["a"][0]
    loaded.give_back()
    assert loaded.dtype == torch.float32
    for name, weight in loaded.model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.allclose(weight, meant[name], rtol=1e-2, atol=1e-3)
    loaded.model.set_attn_implementation("eager")
    assert generate(loaded.model, prompt(20)) == tokens
    assert not hasattr(loaded.model.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantised_weights_get_the_dtype_and_nothing_else_does(dtype: torch.dtype) -> None:
    model = tiny("deepseek_v3")
    model.config.quantization_config = {"quant_method": "fp8", "dequantize": True}
    tell_plain(model, dtype)
    kept = [name for name, weight in model.named_parameters() if weight.dtype != dtype]
    assert kept
    assert all(name.endswith("gate.weight") for name in kept)
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


def int8_with_scales(folder: Path) -> None:
    """Quantise a folder's linear layers by rows, as compressed-tensors stores them."""
    weights: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_rows_of_int8_are_dequantised(plain: Path) -> None:
    pytest.importorskip("compressed_tensors")
    before = read_model(str(plain), torch.float32)
    int8_with_scales(plain)
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel"}
    configured(
        plain,
        quant_method="compressed-tensors",
        format="int-quantized",
        quantization_status="compressed",
        config_groups={"group_0": {"targets": ["Linear"], "weights": scheme}},
        ignore=["lm_head"],
    )
    found = dict(read_model(str(plain), torch.float32).named_parameters())
    for name, weight in before.named_parameters():
        assert torch.allclose(found[name], weight, atol=float(weight.detach().abs().max()) / 250)


def test_integers_need_scales_and_a_method(plain: Path) -> None:
    int8_with_scales(plain)
    with pytest.raises(ConfigError, match=r"no use for: .*down_proj\.weight_scale"):
        read_model(str(plain), torch.float32)
    model, name = tiny("llama"), "model.layers.0.mlp.up_proj.weight"
    stored = {name: "I8", f"{name}_scale": "F32"}
    assert not list(_stored_as_integers(stored, model))
    assert list(_stored_as_integers({name: "I8"}, model)) == [name]


def test_a_scale_that_is_missing(plain: Path) -> None:
    fp8(plain)
    weights = load_file(plain / WEIGHTS)
    del weights["model.layers.1.self_attn.q_proj.weight_scale_inv"]
    save_file(weights, plain / WEIGHTS, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"without scales for model\.layers\.1\.self"):
        load_model(str(plain), "float32")


def test_bytes_of_weights_that_bitsandbytes_quantised() -> None:
    weight = torch.zeros(16, 1, dtype=torch.uint8)
    assert stored_bytes(weight) == 16
    state = type("State", (), {})()
    state.absmax, state.blocksize = torch.zeros(4), 64
    weight.quant_state = state  # type: ignore[attr-defined]
    assert stored_bytes(weight) == 32


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
    "no method": ({"bits": 4}, "by an unknown method"),
    "8 bits of bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "what other rows of a batch hold",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(settings: Any, reason: str, plain: Path) -> None:
    configured(plain, **settings)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        load_model(str(plain), "float32")
    assert "quantised" in caught.value.message
    assert "take the model that it was made from" in caught.value.message


def test_a_model_in_memory_must_be_dequantised_already() -> None:
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModel, match="dequantize=True"):
        adopt_model(model)
    model.config.quantization_config = {"quant_method": "fp8", "dequantize": True}
    adopt_model(model).give_back()


def test_gguf_is_dequantised_where_it_is_all_that_a_folder_holds(tmp_path: Path) -> None:
    """As the demo model is, once."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    shapes = {"token_embd": (32, 32), "output_norm": (32,), "output": (32, 32)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_model(str(tmp_path), torch.float32, gguf_file="tiny.gguf")
    assert all(bool((weight == 0.5).all()) for weight in model.parameters())
    model.save_pretrained(tmp_path / "plain")
    assert load_model(str(tmp_path / "plain"), "float32").max_model_len == 64


def test_gguf_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_1.gguf"
    file.touch()
    for path in (tmp_path, file):
        with pytest.raises(ConfigError, match=r"holds GGUF, .* gguf_file=NAME"):
            load_model(str(path), "float32")


def test_a_method_whose_package_is_not_there(plain: Path) -> None:
    configured(plain, quant_method="compressed-tensors", format="pack-quantized")
    try:
        import compressed_tensors  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install compressed-tensors"):
            load_model(str(plain), "float32")
    else:
        pytest.skip("compressed-tensors is there")
