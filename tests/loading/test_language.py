"""Of checkpoints that also see or hear the language model is served, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from reft_runtime import base_shape
from reft_runtime.base.language import language_model
from reft_runtime.base.pretrained import read_config, read_model, read_tokenizer
from reft_runtime.base.shape import count_parameters, read_base, shape_of
from reft_runtime.errors import ConfigError, UnsupportedModel
from reft_runtime.loading.base import load_base
from reft_runtime.loading.loader import adopt_model, load_model
from tests.helpers.composites import EOS, OF_TYPE, composite
from tests.helpers.models import generate, make_core, prompt, request, run
from tests.helpers.tokenizer import tiny_tokenizer

WEIGHTS = "model.safetensors"
ALONE = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "mistral3": "MistralForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "voxtral": "LlamaForCausalLM",
}


@pytest.fixture(autouse=True)
def _outputs_of_llama_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Llama 4 with its towers run in transformers 5.24.0, which reads what its text lacks."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)


def logits(model: PreTrainedModel) -> Tensor:
    """Of a text without a model's special ids, in the implementation that both have."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ASKED]), use_cache=False).logits
    return found


ASKED = [token % 90 + 3 for token in prompt(30)]


@pytest.mark.parametrize("model_type", OF_TYPE)
def test_the_language_model_of_a_folder(model_type: str, tmp_path: Path) -> None:
    whole = composite(model_type)
    whole.save_pretrained(tmp_path / "whole")
    alone = read_model(str(tmp_path / "whole"), torch.float32)
    assert type(alone).__name__ == ALONE[model_type]
    assert torch.allclose(logits(alone), logits(whole), atol=1e-4)
    # Its parameters are all that is in memory, and those that its configuration counts.
    config = read_config(str(tmp_path / "whole"))
    assert alone.num_parameters() == count_parameters(config) < whole.num_parameters()
    assert config.eos_token_id == EOS
    # A file of one fits the other: the same model, saved without its towers.
    shape = base_shape(str(tmp_path / "whole"))
    alone.save_pretrained(tmp_path / "alone" / "whole")
    assert base_shape(str(tmp_path / "alone" / "whole")) == shape
    assert shape.architecture == ALONE[model_type]
    assert read_base(str(tmp_path / "whole"))[0] == shape


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl", "voxtral"])
def test_tokens_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    whole = composite(model_type, eos_token_id=None)
    whole.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float32")
    answers = run(make_core(loaded, max_step_tokens=7), [request("a", ASKED)])
    assert answers["a"][0] == generate(whole, ASKED)
    assert shape_of(tmp_path.name, loaded) == base_shape(str(tmp_path))


def test_ends_are_those_of_the_whole_model(tmp_path: Path) -> None:
    composite("gemma3").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_model(str(tmp_path), "float32").eos_ids == set(EOS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_heads_that_are_tied(model_type: str, tied: bool, tmp_path: Path) -> None:
    whole = composite(model_type, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path)
    alone = read_model(str(tmp_path), torch.float32)
    head, words = alone.get_submodule("lm_head"), alone.get_input_embeddings()
    assert (head.weight is words.weight) == tied
    assert torch.allclose(logits(alone), logits(whole), atol=1e-4)


def change_weights(folder: Path, **names: str | None) -> None:
    """Rename the weights whose names begin so, or take them out."""
    weights: dict[str, Any] = load_file(folder / WEIGHTS)
    for old, new in names.items():
        for key in [key for key in weights if key.startswith(old)]:
            tensor = weights.pop(key)
            if new is not None:
                weights[new + key.removeprefix(old)] = tensor
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_towers_are_not_read(tmp_path: Path) -> None:
    composite("mistral3").save_pretrained(tmp_path)
    change_weights(tmp_path, vision_tower=None, multi_modal_projector=None)
    left = load_file(tmp_path / WEIGHTS)
    assert all("language_model" in key for key in left)
    assert len(left) == len(dict(read_model(str(tmp_path), torch.float32).named_parameters()))


def test_names_of_weights_before_and_after_transformers_renamed_them(tmp_path: Path) -> None:
    composite("mistral3").save_pretrained(tmp_path)
    before = read_model(str(tmp_path), torch.float32)
    change_weights(tmp_path, **{"language_model.model.": "model.language_model."})
    change_weights(tmp_path, **{"language_model.lm_head.": "lm_head."})
    after = read_model(str(tmp_path), torch.float32)
    assert torch.equal(logits(after), logits(before))


def test_weights_of_the_text_that_are_missing_or_too_many(tmp_path: Path) -> None:
    composite("mistral3").save_pretrained(tmp_path)
    name = "language_model.model.layers.1.mlp.up_proj"
    change_weights(tmp_path, **{name: name.replace("up_proj", "wide_proj")})
    with pytest.raises(ConfigError) as caught:
        read_model(str(tmp_path), torch.float32)
    assert "without weights for model.layers.1.mlp.up_proj.weight" in caught.value.message
    assert "no use for: model.layers.1.mlp.wide_proj.weight" in caught.value.message


def test_a_configuration_whose_towers_need_other_packages(tmp_path: Path) -> None:
    tower = {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"}
    text: dict[str, Any] = {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "hidden_size": 32}
    text |= {"layer_types": ["sliding_attention"] * 4 + ["full_attention"]}
    values = {"model_type": "gemma3n", "text_config": text, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = base_shape(str(tmp_path))
    assert (shape.architecture, shape.num_layers) == ("Gemma3nForCausalLM", 5)


def test_a_language_model_without_a_class(tmp_path: Path) -> None:
    AutoConfig.for_model("glm4v").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="its language model in no class"):
        load_model(str(tmp_path), "float32")
    with pytest.raises(ConfigError, match="no causal language model, and has none in it"):
        base_shape(str(tmp_path))


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "voxtral"])
def test_a_model_in_memory(model_type: str) -> None:
    whole = composite(model_type, eos_token_id=None)
    before, tokens = logits(whole), generate(whole, ASKED)
    whole.train(True)
    name, loaded, _ = load_base(whole, tiny_tokenizer(), "auto", None)
    assert loaded.architecture == ALONE[model_type]
    assert shape_of(name, loaded) == base_shape(whole)
    with pytest.raises(ConfigError, match="has this model object"):
        load_base(whole, tiny_tokenizer(), "auto", None)
    with pytest.raises(ConfigError, match="has this model object"):
        load_base(language_model(whole), tiny_tokenizer(), "auto", None)
    answers = run(make_core(loaded, max_step_tokens=7), [request("a", ASKED)])
    assert answers["a"][0] == tokens
    loaded.give_back()
    assert all(module.training for module in whole.modules())
    whole.train(False)
    assert torch.equal(logits(whole), before)
    load_base(whole, tiny_tokenizer(), "auto", None)[1].give_back()


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5"])
def test_language_models_in_memory_share_their_modules(model_type: str) -> None:
    whole = composite(model_type)
    alone = language_model(whole)
    assert type(alone).__name__ == ALONE[model_type]
    theirs = set(map(id, whole.parameters()))
    assert {id(weight) for weight in alone.parameters()} < theirs
    assert torch.equal(logits(alone), logits(whole))


def test_a_model_in_memory_whose_language_model_is_another_class() -> None:
    whole = composite("qwen2_5_vl")
    with pytest.raises(UnsupportedModel, match=r"Qwen2_5_VLTextModel, .* give the folder"):
        adopt_model(whole)


def test_a_chat_template_beside_the_tokenizer(tmp_path: Path) -> None:
    """Older folders with a processor have the template in a file of their own."""
    inner = tiny_tokenizer()
    template, inner.chat_template = inner.chat_template, None
    inner.save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert read_tokenizer(str(tmp_path)).chat_template == template
