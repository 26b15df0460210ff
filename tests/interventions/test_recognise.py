"""What is said of a file that is no intervention file: the same to all who read it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from reft_runtime.errors import FileTooLarge, InvalidFile
from reft_runtime.interventions import Registry, parse, read, read_header
from tests.interventions.make import BASE


def saved(*names: str, pad: str = "") -> bytes:
    metadata = {"pad": pad} if pad else None
    return save({name: torch.zeros(2) for name in names}, metadata)


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file)
    return file.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "LoRA": (
        saved("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
        "an adapter, such as a LoRA, which",
    ),
    "IA3": (
        saved("base_model.model.model.layers.0.mlp.down_proj.ia3_l"),
        "an adapter that edits hidden states; `reft import` makes",
    ),
    "ReFT": (
        saved("model.layers.0.reft_layer.refts.a.units.0.projection.weight"),
        "an adapter that edits hidden states; `reft import` makes",
    ),
    "LoFiT": (
        saved("model.embed_tokens.weight", "model.layers.0.self_attn.attn_A.0"),
        "an adapter that edits hidden states; `reft import` makes",
    ),
    "steerling": (
        saved("adapters.layer0_block.up.weight", "base_model.model.layers.0.mlp.up_proj.weight"),
        "an adapter that edits hidden states; `reft import` makes",
    ),
    "VeRA": (
        saved("base_model.model.model.layers.0.mlp.down_proj.vera_lambda_b"),
        "an adapter, such as a LoRA, which",
    ),
    "llama": (saved("model.layers.3.mlp.up_proj.weight"), "a model's weights"),
    "gpt2": (saved("h.0.attn.bias"), "a model's weights"),
    "embedding": (saved("lm_head.weight"), "a model's weights"),
    "pyreft": (pickled(), "never read here; `reft import` takes a file of vectors"),
    "SAE": (saved("W_enc", "W_dec", "b_dec"), "an SAE; `reft import` makes"),
    "saklas": (saved("layer_3", "layer_12"), "vectors by layer; `reft import` makes"),
    "svec": (
        b'{"model_type": "llama", "directions": {"3": [0.25, ' + b"0.5, " * 999,
        "vectors by layer; `reft import`",
    ),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr': '<f4'", "an array of numpy; `reft import` makes"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "a model in the GGUF format"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid ", "run `git lfs pull`"),
    "Parquet": (b"PAR1" + bytes(64), "a Parquet file; `reft train`"),
    "gzip": (b"\x1f\x8b\x08\0abcd" + bytes(64), "a gzip archive"),
    "JSON": (b'{"prompt": "Hi", "completion": "Ho"}\n', "a JSON file; `reft train`"),
    "BOM": (b'\xef\xbb\xbf[{"text": "a"}]', "a JSON file"),
    "CSV": (b"text,label\nHello,greeting\n", "a table of texts; `reft train`"),
    "TSV": (b"text\tlabel\r\nHello\tgreeting\r\n", "a table of texts"),
    "page": (b"\n<!doctype html>", "a web page"),
    "text": (b"Hello, there", "a text file"),
    "short": (b"Hi", "a text file"),
    "cut character": (("a" * 4095 + "é" * 9).encode(), "a text file"),
}


@pytest.mark.parametrize("text", ["lora_ ", "h.1.", "."])
def test_a_long_header_takes_no_long_time(text: str) -> None:
    # The text is a value, and no name: it is searched to its end, from each of its beginnings.
    data = save({"x": torch.zeros(2)}, {"a": text * (120_000 // len(text))})
    before = time.process_time()
    with pytest.raises(InvalidFile, match="no manifest"):
        parse(data)
    assert time.process_time() - before < 1


@pytest.mark.parametrize("case", FILES)
def test_what_a_file_is(case: str, tmp_path: Path) -> None:
    data, message = FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    said = []
    for call in (lambda: parse(data), lambda: read_header(path)):
        with pytest.raises(InvalidFile, match=r"^Not an intervention file but ") as caught:
            call()
        said.append(caught.value.message)
    registry = Registry(BASE, [tmp_path])
    said += registry.problems().values()
    with pytest.raises(InvalidFile) as refused:
        registry.put("x", data)
    said.append(refused.value.message)
    assert len(said) == 4
    assert len(set(said)) == 1
    assert message in said[0]


@pytest.mark.parametrize("data", [saved("weight"), bytes(64), b"\xff" * 64, b"\0\1text" * 9])
def test_what_is_not_known_is_not_guessed(data: bytes) -> None:
    with pytest.raises(InvalidFile, match=r"no manifest|Header length"):
        parse(data)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(saved("lm_head.weight", pad="x" * 9000))
    with pytest.raises(FileTooLarge, match=r"at most 40\.$"):  # its names come later
        read(path, 40)
    path.write_bytes(saved("lm_head.weight"))
    with pytest.raises(FileTooLarge, match=r"at most 40\. It is a model's weights"):
        read(path, 40)


FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "empty": ((), r"but a folder\.$"),
    "LoRA": (
        ("adapter_config.json", "config.json"),
        "the folder of an adapter; `reft import` makes an intervention file of one that edits",
    ),
    "pyreft": (("config.json", "intkey_layer.3.bin"), "but a checkpoint of pyreft; `reft import`"),
    "trainer": (("intervenable_model",), "but a checkpoint of pyreft"),
    "model": (("config.json", "model.safetensors"), "but a model's folder"),
    "SAE": (("cfg.json", "sae_weights.safetensors"), "but an SAE; `reft import` makes"),
    "refusal": (("direction.pt",), "but a direction to ablate; `reft import` makes"),
    "RED": (("config.json", "delta_vector.pth"), "but edits of RED or BREP; `reft import` makes"),
    "files": (("b.safetensors", "a.safetensors"), "such as a.safetensors"),
}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("call", [read, read_header])
def test_what_a_folder_is(case: str, call: Callable[[Path], object], tmp_path: Path) -> None:
    names, message = FOLDERS[case]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InvalidFile, match="Not a regular file but ") as caught:
        call(tmp_path)
    with pytest.raises(InvalidFile, match=message):
        raise caught.value
