"""Steering vectors as long as the base model's rows where they are added."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.interventions import Edit, Intervention
from reft_runtime.training import in_norms
from reft_runtime.training.norms import TEXTS
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors
from tests.training.make import SHAPE, model

VECTOR = torch.arange(1.0, 1 + SHAPE.hidden_size)


def steering(*places: tuple[int, str], vector: torch.Tensor = VECTOR) -> Intervention:
    edits = [
        Edit(layer, "all", {"v": vector}, kind="steering", component=component)
        for layer, component in places
    ]
    return Intervention.build(SHAPE, edits, template="chat", training={"source": "vector"})


def test_each_vector_is_as_long_as_the_rows_of_its_place() -> None:
    plain, tokenizer = model(), tiny_tokenizer()
    rows: dict[str, list[torch.Tensor]] = {"block 1": [], "block 2": [], "mlp 1": []}
    mlp = plain.get_submodule("model.layers.1.mlp")
    mlp.register_forward_pre_hook(lambda _, args: rows["mlp 1"].append(args[0][0, 1:]))
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = plain(input_ids=ids, output_hidden_states=True).hidden_states
        rows["block 1"].append(states[2][0, 1:])
        rows["block 2"].append(states[3][0, 1:])
    wanted = [float(torch.cat(each).norm(dim=1).mean()) for each in rows.values()]
    places = (1, "block_output"), (2, "block_output"), (1, "mlp_input")
    asked = steering(*places)
    made = in_norms(asked, model=model(), tokenizer=tokenizer, scale=-0.5)
    for index, norm in enumerate(wanted):
        vector = made.tensors[f"edits.{index}.v"]
        torch.testing.assert_close(vector, -0.5 * norm * VECTOR / VECTOR.norm(), rtol=1e-3, atol=0)
    assert made.manifest.training["norms"] == pytest.approx(wanted, rel=1e-3)
    assert made.manifest.training["source"] == "vector"
    assert made.manifest.template == "chat"
    assert len(set(wanted)) == 3
    assert asked.tensors["edits.0.v"].equal(VECTOR), "what was given is not changed"


def test_what_has_no_length_to_change_is_refused() -> None:
    given: dict[str, Any] = {"model": model(), "tokenizer": tiny_tokenizer()}
    loreft = Intervention.build(SHAPE, [Edit(1, "l1", loreft_tensors(1, d=SHAPE.hidden_size))])
    with pytest.raises(ConfigError, match="in-norms: edit 0 is loreft"):
        in_norms(loreft, **given)
    zeros = steering((1, "block_output"), (2, "block_output"), vector=0 * VECTOR)
    with pytest.raises(ConfigError, match="in-norms: the vector of edit 0 is zero"):
        in_norms(zeros, **given)
    for scale in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="scale: must be a finite number other than 0"):
            in_norms(steering((1, "block_output")), **given, scale=scale)
    narrow = [Edit(1, "all", {"v": torch.ones(8)}, kind="steering")]
    of_another = Intervention.build(SHAPE.model_copy(update={"hidden_size": 8}), narrow)
    with pytest.raises(ReftError, match="wide in the loaded model"):
        in_norms(of_another, **given)
