"""A shipped file, exported and loaded by pyreft, generates there what it generates here.

pyreft's `load` makes every learned map bfloat16 and then cannot run it in a float32 model, so the
loaded modules are widened and given their exact values again, as a float32 user must.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from reft_runtime.interventions import parse, read
from reft_runtime.interventions.pyreft import export_pyreft, import_pyreft
from tests.e2e.conftest import INTERVENTIONS
from tests.helpers.pyreft import pyreft

REFERENCE: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "pyreft_reference.json").read_text()
)


@pytest.mark.parametrize("name", list(REFERENCE))
def test_exported_file_generates_the_same_in_pyreft(
    name: str, tmp_path: Path, reference: PreTrainedModel
) -> None:
    shipped = parse(read(INTERVENTIONS / f"{name}.safetensors"))
    folder = tmp_path / name
    export_pyreft(shipped, folder)
    reft = pyreft.ReftModel.load(str(folder), reference)
    for key, module in reft.interventions.items():
        [file] = (path for path in folder.glob("*.bin") if key in path.name)
        module.to(torch.float32).load_state_dict(torch.load(file, weights_only=True))
    for case in REFERENCE[name]:
        ids = torch.tensor([case["prompt_tokens"]])
        locations = (None, [[where] for where in case["unit_locations"]])
        _, out = reft.generate(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            unit_locations={"sources->base": locations},
            intervene_on_prompt=True,
            do_sample=False,
            num_beams=1,
            max_new_tokens=24,
        )
        assert out[0, ids.shape[1] :].tolist() == case["generated_ids"]

    positions = str(shipped.manifest.edits[0].positions)
    again = import_pyreft(
        folder, base=shipped.manifest.base, positions=positions, share_weights=True, act="linear"
    )
    assert again.tensors.keys() == shipped.tensors.keys()
    assert all(torch.equal(again.tensors[key], shipped.tensors[key]) for key in again.tensors)
