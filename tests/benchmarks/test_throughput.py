import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.throughput import main
from benchmarks.throughput_plots import main as draw
from benchmarks.workload import LORA_RANK, write_lora
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer

CASES = "f7,floor"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny("llama", max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_tables_raw_figures_and_pictures(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"

    def run() -> str:
        main(str(model), "float32", "1,2", 1, CASES, mix=False, vllm=None, peers=None, out=raw)
        return capsys.readouterr().out

    printed = run()
    lines = [line for line in printed.splitlines() if line.startswith("| float32")]
    assert [line.split("|")[2].strip() for line in lines] == ["1"] * 3 + ["2"] * 3
    assert "vLLM" not in printed
    assert run() == printed  # nothing is measured again

    draw(raw, tmp_path)
    assert "requests at once" in (tmp_path / "throughput.svg").read_text()
    assert (tmp_path / "tasks.svg").stat().st_size > 0


def test_lora_adapter_has_every_linear_layer_of_the_blocks(tmp_path: Path) -> None:
    model = tiny("llama")
    write_lora(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    linears = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    assert len(tensors) == 2 * len(linears) > 0
    for name in linears:
        stem = "base_model.model." + name.removesuffix(".weight")
        out, inner = model.get_parameter(name).shape
        assert tensors[f"{stem}.lora_A.weight"].shape == (LORA_RANK, inner)
        assert tensors[f"{stem}.lora_B.weight"].shape == (out, LORA_RANK)
        assert tensors[f"{stem}.lora_B.weight"].any()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], "lm_head" in config["target_modules"]) == (LORA_RANK, False)
