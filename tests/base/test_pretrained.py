"""Model folders: none of their code runs, all weights come from them, faults are one line."""

from __future__ import annotations

import ast
import io
import json
import logging
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import benchmarks
import reft_runtime
from reft_runtime.base.pretrained import read_model
from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.loading.base import load_base
from server.cli import main as cli
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder: a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "sound"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**config, **values}))


def change_weights(folder: Path, **values: Tensor | None) -> None:
    """Take weights out (None), or put others in; dots are written as two underscores."""
    weights: dict[str, Any] = load_file(folder / WEIGHTS)
    weights |= {name.replace("__", "."): value for name, value in values.items()}
    left = {name: value for name, value in weights.items() if value is not None}
    save_file(left, folder / WEIGHTS, {"format": "pt"})


def load(folder: Path) -> Any:
    return load_base(str(folder), None, "float32", None)[1]


@pytest.mark.parametrize(
    ("model_type", "dtype", "kept"),
    [
        ("deepseek_v3", torch.bfloat16, ["mlp.gate.weight", "e_score_correction_bias"]),
        ("gpt_oss", torch.float16, ["layernorm.weight", "model.norm.weight"]),
    ],
)
def test_numbers_have_the_dtypes_of_transformers(
    model_type: str, dtype: torch.dtype, kept: list[str], tmp_path: Path
) -> None:
    """Some stay in float32 (`_keep_in_fp32_modules`), rotary frequencies always."""
    tiny(model_type).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found = read_model(str(tmp_path), dtype)
    numbers = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    for name, wanted in [*own.named_parameters(), *own.named_buffers()]:
        assert numbers[name].dtype == wanted.dtype, name
        assert torch.equal(numbers[name], wanted), name
    exact = [name for name, number in numbers.items() if number.dtype == torch.float32]
    for part in (*kept, "inv_freq"):
        assert any(part in name for name in exact)
    assert found.dtype == dtype


def fault(folder: Path) -> str:
    """The one line that a start ends with."""
    with pytest.raises(ReftError) as caught:
        load(folder)
    message = caught.value.message
    assert "\n" not in message
    assert len(message) < 600
    return message


# Code of a folder

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return None
"""


@pytest.fixture
def marker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the folder's code makes; whatever is asked on the terminal is answered yes."""
    path = tmp_path / "it-ran"
    (folder / "own.py").write_text(CODE.format(marker=str(path)))
    generation = folder / "custom_generate"
    generation.mkdir()
    (generation / "generate.py").write_text(CODE.format(marker=str(path)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return path


OWN = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


@pytest.mark.parametrize("known", [True, False], ids=["known-type", "unknown-type"])
def test_code_of_a_config_and_a_model_never_runs(folder: Path, marker: Path, known: bool) -> None:
    change_config(folder, auto_map=OWN, model_type="llama" if known else "own")
    if known:
        load(folder)  # what transformers itself knows is what is loaded
    else:
        assert "never run" in fault(folder)
    assert not marker.exists()
    assert sys.stdin.read(2) == "y\n"  # nobody asked


def test_code_of_a_tokenizer_never_runs(folder: Path, marker: Path) -> None:
    own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    change_config(folder, "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    with suppress(ConfigError):  # or another class of tokenizer is taken
        load(folder)
    assert not marker.exists()
    assert sys.stdin.read(2) == "y\n"


def test_code_for_generation_never_runs(folder: Path, marker: Path) -> None:
    change_config(folder, "generation_config.json", custom_generate=str(folder))
    load(folder)
    assert not marker.exists()
    assert sys.stdin.read(2) == "y\n"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_code_that_attends_is_not_a_folders_to_choose(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    from reft_runtime.base.pretrained import read_config
    from reft_runtime.base.shape import count_parameters

    fetched: list[Any] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda *args, **_: fetched.append(args),
    )
    change_config(folder, **{key: value})
    load(folder)
    count_parameters(read_config(str(folder)))
    assert fetched == []


def test_the_base_of_an_intervention_is_read_without_its_code(folder: Path, marker: Path) -> None:
    from reft_runtime.base.shape import read_base

    change_config(folder, auto_map=OWN, model_type="own")
    with pytest.raises(ConfigError, match="never run") as caught:
        read_base(str(folder))
    assert caught.value.param == "base"
    assert not marker.exists()


def test_every_call_that_loads_anything_forbids_code() -> None:
    roots = [Path(package.__file__ or "").parent for package in (reft_runtime, cli, benchmarks)]
    found = 0
    for path in [path for root in roots for path in root.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of = node.func.value
            if node.func.attr in ("from_pretrained", "from_config") and isinstance(of, ast.Name):
                if not of.id.startswith("Auto"):
                    continue
                found += 1
                flags = {k.arg: k.value for k in node.keywords}
                flag = flags.get("trust_remote_code")
                assert isinstance(flag, ast.Constant), f"{path}:{node.lineno}"
                assert flag.value is False
    assert found > 5


# Weights

WRONG_WEIGHTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no head": ({"lm_head__weight": None}, "without weights for lm_head.weight"),
    "no matrix": (
        {"model__layers__1__mlp__up_proj__weight": None},
        "without weights for model.layers.1.mlp.up_proj.weight",
    ),
    "another shape": (
        {"model__layers__0__mlp__up_proj__weight": torch.zeros(3, 5)},
        "model.layers.0.mlp.up_proj.weight ([3, 5] instead of [48, 32])",
    ),
    "a layer more": (
        {"model__layers__4__mlp__up_proj__weight": torch.zeros(48, 32)},
        "no use for: model.layers.4.mlp.up_proj.weight",
    ),
    "a bias": (
        {"model__layers__0__self_attn__q_proj__bias": torch.zeros(32)},
        "no use for: model.layers.0.self_attn.q_proj.bias",
    ),
    "a layer more, named from its list on": (
        {"layers__4__mlp__up_proj__weight": torch.zeros(48, 32)},
        "no use for: layers.4.mlp.up_proj.weight",
    ),
    "an adapter": (
        {"base_model__model__x__q_proj__lora_A__weight": torch.zeros(2, 32)},
        "no use for: base_model.model.x.q_proj.lora_A.weight",
    ),
    "integers": (
        {"model__layers__0__mlp__up_proj__weight": torch.zeros(48, 32, dtype=torch.int8)},
        "with integers instead of weights for model.layers.0.mlp.up_proj.weight",
    ),
    "a norm more": (
        {"model__layers__0__self_attn__q_norm__weight": torch.zeros(8)},
        "no use for: model.layers.0.self_attn.q_norm.weight",
    ),
}


@pytest.mark.parametrize(("change", "named"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_are_not_the_models_are_named(
    change: dict[str, Tensor | None], named: str, folder: Path
) -> None:
    change_weights(folder, **change)
    assert named in fault(folder)


def test_keys_with_a_prefix_are_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({f"module.{k}": v for k, v in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    message = fault(folder)
    assert "without weights for lm_head.weight" in message
    assert "more" in message


def test_a_missing_layer_is_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    layer = {k.replace(".", "__"): None for k in weights if k.startswith("model.layers.2.")}
    change_weights(folder, **layer)
    assert "without weights for model.layers.2." in fault(folder)


def test_what_does_not_matter_is_no_fault(folder: Path) -> None:
    change_weights(
        folder,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
        v_head__summary__weight=torch.zeros(1, 32),
    )
    load(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    load(tmp_path)


# Files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs(name: str, folder: Path) -> None:
    (folder / name).write_bytes(POINTER)
    message = fault(folder)
    assert name in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("left", [POINTER, b"\x80\x04K\x01.", b"PK\x03\x04"])
def test_a_pickled_weights_file_that_cannot_be_read(left: bytes, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(left)
    message = fault(folder)
    assert "git lfs pull" in message if left == POINTER else "take safetensors" in message


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_told(whole: bool, folder: Path) -> None:
    change_config(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="x")
    if not whole:
        (folder / "config.json").unlink()
    assert "merge_and_unload" in fault(folder)


@pytest.mark.parametrize("length", [0, 5, 500, -100])
def test_a_cut_weights_file(length: int, folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    message = fault(folder)
    assert WEIGHTS in message
    assert "fetch it again" in message


def test_a_shard_that_is_not_there(folder: Path) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert "model-00002-of-00002.safetensors; fetch" in fault(folder)
    index.write_text("[1]")
    assert "index.json is damaged" in fault(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_files_that_are_not_there(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert name in fault(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "fbgemm_fp8", "nvfp4"])
def test_quantised_weights(method: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    message = fault(folder)
    assert f"quantised ({method})" in message
    assert "take the model that it was made from" in message


CONFIGS = {
    "no json": "{",
    "a list": "[1]",
    "nothing": "{}",
    "unknown type": '{"model_type": "zzz"}',
    "wrong type": '{"model_type": "llama", "hidden_size": "x"}',
    "no language model": '{"model_type": "vit"}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_cannot_be_read(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "odel" in fault(folder)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gemma3_text", "mistral"])
def test_a_folder_without_a_tokenizer_is_told_before_its_weights_are_read(
    model_type: str, tmp_path: Path
) -> None:
    tiny(model_type).config.save_pretrained(tmp_path)
    message = fault(tmp_path)
    assert "tokenizer" in message
    assert "tokenizer.json" in message


def test_a_tokenizer_that_is_none_is_told(folder: Path) -> None:
    change_config(folder, "tokenizer_config.json", tokenizer_class="RagTokenizer")
    assert "tokenizer" in fault(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1}'])
def test_a_damaged_tokenizer(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer" in fault(folder)


def test_the_command_ends_with_one_line_and_status_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(folder, lm_head__weight=None)
    monkeypatch.setattr(sys, "argv", ["reft", "generate", "Hello", "--model", str(folder)])
    monkeypatch.setattr(cli, "_leave", sys.exit)  # it would end this process, too
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "lm_head.weight" in line]
    assert len(told) == 1
    assert told[0].startswith("reft: model: ")


def test_folders_are_looked_at_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reft_runtime.front.engine import Engine
    from reft_runtime.interventions.registry.store import Store

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("reft_runtime.front.resident.load_base", loaded)
    with pytest.raises(ConfigError, match="does not exist"):
        Engine("demo", interventions=tmp_path / "none")
    store = Store(tmp_path / "state")
    with pytest.raises(ConfigError, match="in use by another server"):
        Engine("demo", state_dir=tmp_path / "state")
    store.close()
    with pytest.raises(AssertionError, match="loaded first"):
        Engine("demo", state_dir=tmp_path / "state", interventions=tmp_path)


def test_the_models_own_generation_settings_are_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    assert not caplog.records
    change_config(folder, "generation_config.json", repetition_penalty=1.3, temperature=0.6)
    with caplog.at_level(logging.WARNING, logger="reft_runtime"):
        load(folder)
    (record,) = caplog.records
    assert "repetition_penalty=1.3" in record.getMessage()
    assert "temperature=0.6" in record.getMessage()
    assert "eos_token_id" not in record.getMessage()


def test_a_log_gets_stages_and_no_progress_bars(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="reft_runtime.base.stages")
    load(folder)
    assert "Loading weights" not in capfd.readouterr().err
    told = [r.getMessage() for r in caplog.records if r.name == "reft_runtime.base.stages"]
    assert [line.rpartition(":")[0] for line in told if not line.endswith("far")] == [
        "Finding the model",
        "Loading the weights",
        "Asking the model for its own logits",
        "Packing the weights",
        "Checking what will be served",
    ]
