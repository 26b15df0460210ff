"""What the engine would compute otherwise than the model does is refused, with the reason."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from reft_runtime.errors import ConfigError, UnsupportedModel
from reft_runtime.loading import loader
from reft_runtime.loading.loader import adopt_model, choose_device, choose_dtype, load_model
from reft_runtime.machine.contention import StepWatch
from tests.helpers.models import (
    HIDDEN,
    MAX_LENGTH,
    VOCABULARY,
    make_core,
    prompt,
    run,
    tiny,
    tiny_llama,
)
from tests.helpers.models import request as ask
from tools.tiny_models import tiny_config, tiny_model


def bare(model_type: str, **values: Any) -> PreTrainedModel:
    """A model whose config takes none of the usual names."""
    config = AutoConfig.for_model(model_type, **values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    return model


def small_bloom() -> PreTrainedModel:
    return bare("bloom", vocab_size=32, hidden_size=16, n_layer=2, n_head=2)


REFUSED: dict[str, tuple[Any, str]] = {
    "states in a cache of its own": (lambda: tiny("minimax", head_dim=8), "keeps its states"),
    "an indexer": (lambda: tiny_model(tiny_config("qwen4_exp_text")), "an indexer chooses which"),
    "another kind of layers": (lambda: tiny_model(tiny_config("deepseek_v4")), "another kind"),
    "ALiBi": (small_bloom, "ALiBi"),
    "ALiBi by a flag": (
        lambda: bare(
            "falcon",
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            alibi=True,
        ),
        "ALiBi",
    ),
    "own attention code": (lambda: tiny_model(tiny_config("xglm")), "interface"),
    "encoder": (lambda: tiny("bert"), "an encoder"),
    "decoder of an encoder's output": (lambda: tiny_model(tiny_config("trocr")), "encodes"),
    "no number of layers": (lambda: tiny_model(tiny_config("blt")), "num_hidden_layers"),
    "attention with a term of its own": (lambda: tiny("doge"), "changes attention masks"),
    "float64": (lambda: tiny("llama").double(), "in float64; convert it to float32, bfloat16"),
    "attention twice a layer": (lambda: tiny("diffllama"), "more than once"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refusal_names_the_model_and_the_reason(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModel) as refusal:
        adopt_model(model)
    assert reason in refusal.value.message
    assert repr(model.config.model_type) in refusal.value.message


def test_a_folder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tiny_config("deepseek_v32").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="indexer"):
        load_model(str(tmp_path), "float32")


def test_an_encoder_decoder_folder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load_model(str(tmp_path), "float32")


def test_a_folder_of_a_draft_model_is_refused_for_what_it_is(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma4_unified_assistant").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="drafts for another model"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_a_sequence_ends_where_all_tokens_would_be_rotated_otherwise(rope_type: str) -> None:
    model = rotating_otherwise(rope_type)
    assert adopt_model(copy.deepcopy(model)).max_model_len == 64
    with pytest.raises(ConfigError, match="64") as error:
        adopt_model(model, max_model_len=65)
    assert error.value.param == "max_model_len"


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rotary_angles_that_depend_on_the_longest_sequence_are_seen(
    rope_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.loading.loader.chosen_length", lambda *_: 128)
    with pytest.raises(UnsupportedModel, match="differ from its own"):
        adopt_model(rotating_otherwise(rope_type))


def rotating_otherwise(rope_type: str) -> PreTrainedModel:
    """A model that rotates all tokens otherwise in a text of more than 64."""
    if rope_type == "dynamic":
        return tiny(
            "llama",
            max_position_embeddings=64,
            rope_parameters={"rope_theta": 10000.0, "rope_type": rope_type, "factor": 2.0},
        )
    half = HIDDEN // 4 // 2
    return tiny(
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": 10000.0,
            "short_factor": [1.0] * half,
            "long_factor": [2.0] * half,
            "original_max_position_embeddings": 64,
        },
    )


@pytest.mark.parametrize("length", [0, MAX_LENGTH + 1])
def test_the_length_never_passes_the_models_positions(length: int, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"from 1 to {MAX_LENGTH}") as error:
        load_model(str(tmp_path), "float32", max_model_len=length)
    assert error.value.param == "max_model_len"
    with pytest.raises(ConfigError, match=f"from 1 to {MAX_LENGTH}"):
        adopt_model(model, max_model_len=length)
    assert adopt_model(model, max_model_len=MAX_LENGTH).max_model_len == MAX_LENGTH


def test_a_saved_model_answers_as_the_one_in_memory(tmp_path: Path) -> None:
    model, adopted = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float32", max_model_len=40)
    assert (loaded.max_model_len, loaded.vocab_size, loaded.hidden_size) == (40, VOCABULARY, HIDDEN)
    assert loaded.dtype == torch.float32
    asked = [ask("a", prompt(9))]
    assert run(make_core(loaded), asked) == run(make_core(adopted), asked)


def test_a_model_can_be_adopted_again() -> None:
    _, loaded = tiny_llama()
    again = adopt_model(loaded.model)
    assert again.shapes == loaded.shapes


def test_end_of_answer_ids_come_from_the_generation_config() -> None:
    model = tiny("llama", eos_token_id=5)
    assert adopt_model(model).eos_ids == {5}
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[7, 9]
    )
    assert adopt_model(model).eos_ids == {7, 9}


@pytest.mark.parametrize("name", ["tpu", "auto", "cuda:99", "meta"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_unknown_dtypes_and_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int3"):
        choose_dtype("int3", torch.device("cpu"))
    with pytest.raises(ConfigError, match="there is no folder"):
        load_model(str(tmp_path / "none"), "float32")
    with pytest.raises(ConfigError, match=r"^model: https://host/m is a URL; give a folder"):
        load_model("https://me:secret@host/m?key=secret", "float32")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"model.safetensors is a file; give the folder"):
        load_model(str(tmp_path / "model.safetensors"), "float32")


def test_fewer_threads_load_while_others_want_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    waiting = partial(StepWatch, wall=lambda: float(next(ticks)), cpu=lambda: 0.0)
    monkeypatch.setattr(loader, "StepWatch", waiting)
    used = list[int]()
    model = tiny("llama")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        adopt_model(model)
        assert list(dict.fromkeys(used)) == [4, 2, 1]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
