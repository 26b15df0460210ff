"""Steering vectors from contrasting texts."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.training import direction
from reft_runtime.training.direction import read_texts
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import model


def test_a_direction_is_the_difference_of_means() -> None:
    positive, negative = ["and the end", "the sting is"], ["you", "er you on st"]
    made = direction(
        positive, negative, layer=2, model=model(), tokenizer=tiny_tokenizer(), progress=False,
        scale=0.5,
    )  # fmt: skip
    plain, tokenizer = model(), tiny_tokenizer()

    def mean(texts: list[str]) -> torch.Tensor:
        means = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                hidden = plain(input_ids=ids, output_hidden_states=True).hidden_states[3][0]
            if ids.shape[1] > 1:
                means.append(hidden[1:].mean(0))
        return torch.stack(means).mean(0)

    vector = made.tensors["edits.0.v"]
    torch.testing.assert_close(
        vector, 0.5 * (mean(positive) - mean(negative)), atol=1e-4, rtol=1e-3
    )
    assert str(made.manifest.edits[0].positions) == "all"


def test_a_direction_is_read_where_it_is_asked_for() -> None:
    texts = ["and the end", "the sting is"], ["you", "er you on st"]
    plain, tokenizer = model(), tiny_tokenizer()
    chat = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True
        )
    )
    for template, laid_out in ((None, "{}"), ("the {prompt} is", "the {} is"), ("chat", chat)):
        made = direction(
            *texts, layer=2, model=model(), tokenizer=tiny_tokenizer(), progress=False,
            read="l1", template=template,
        )  # fmt: skip
        means = []
        for some in texts:
            ids = [tokenizer(laid_out.format(text), return_tensors="pt").input_ids for text in some]
            with torch.no_grad():
                seen = [
                    plain(input_ids=one, output_hidden_states=True)
                    for one in ids
                    if one.numel() > 1
                ]
            means.append(torch.stack([one.hidden_states[3][0, -1] for one in seen]).mean(0))
        vector = made.tensors["edits.0.v"]
        torch.testing.assert_close(vector, means[0] - means[1], atol=1e-4, rtol=1e-3)
        assert made.manifest.template == template
        assert made.manifest.training["read"] == "l1"


def test_texts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\u2028still\x85one\r\n\n  two\rstill two \n".encode())
    assert read_texts(path) == ["one\u2028still\x85one", "two\rstill two"]


def test_directions_that_cannot_be() -> None:
    given: dict[str, Any] = {"model": model(), "tokenizer": tiny_tokenizer(), "progress": False}
    with pytest.raises(ConfigError, match=r"layer: 9; .* has 0 to 3"):
        direction(["the end"], ["the end"], layer=9, **given)
    with pytest.raises(ConfigError, match="negative: there is no text of two tokens"):
        direction(["the end"], ["a"], layer=1, **given)
    with pytest.raises(ConfigError, match="positive: there is no text of tokens at decode"):
        direction(["the end"], ["a"], layer=1, read="decode", **given)
    with pytest.raises(
        ConfigError, match=r"negative: a text has \d+ tokens, and the model takes 256"
    ):
        direction(["the end"], ["the end" * 120], layer=1, **given)
    for scale in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"^scale: must be a finite number, not"):
            direction(["the end"], ["the sting"], layer=1, scale=scale, **given)
    with pytest.raises(ConfigError, match=r"^positions: 'last' is not understood.* or all\.$"):
        direction(["the end"], ["the sting"], layer=1, positions="last", **given)
    with pytest.raises(ConfigError, match=r"^read: 'last' is not understood; write fN"):
        direction(["the end"], ["a"], layer=1, read="last", **given)
    for negative, scale in (("the end", 1.0), ("er you on st", 0.0)):
        with pytest.raises(ConfigError, match="The vector is zero"):
            direction(["the end"], [negative], layer=1, scale=scale, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 9}, "layer: 9; .* has 0 to 3"),
        ({"positions": "x9"}, "positions: 'x9' is not understood"),
        ({"scale": float("nan")}, "scale: must be a finite number"),
        ({"description": "x" * 5000}, "description: "),
    ],
)
def test_what_is_wrong_with_a_direction_is_told_before_the_model_is_loaded(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("reft_runtime.training.states")
    monkeypatch.setattr(module, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ReftError, match=message):
        direction(["the end"], ["a"], **{"layer": 1, "model": model(), **changes})
