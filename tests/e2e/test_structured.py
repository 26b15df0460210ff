"""Many forms at once at temperature 1, through many interventions: every answer has its own."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest

from benchmarks.grammar_tasks import task_schemas
from reft_runtime import Engine, SamplingParams
from reft_runtime.front.asked import Uses
from reft_runtime.sampling import Grammar

MODELS = [None, "pirate", "emoji", "formal", "telegram", "sentiment", "question-type"]


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy whose texts, lists and objects are short, so that a small model ends them."""
    made = copy.deepcopy(schema)
    stack: list[Any] = [made]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            kinds = node.get("type")
            if kinds == "string" and not node.keys() & {"enum", "const", "format", "pattern"}:
                node["maxLength"] = max(12, node.get("minLength", 0))
            if kinds == "array":
                node["maxItems"] = max(2, node.get("minItems", 0))
            if kinds == "object" and "properties" in node:
                node["additionalProperties"] = False
            if kinds == "number":
                node |= {"type": "integer", "minimum": 0, "maximum": 1000}
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return made


def schemas() -> list[dict[str, Any]]:
    """50 schemas: those of typical tasks, strict and not, and lists of some of them."""
    single = [bounded(schema) for schema in task_schemas().values()]
    lists = [
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {name: part for name, part in one.items() if name != "$defs"},
            "$defs": one.get("$defs", {}),
        }
        for one in single[:24:2]
    ]
    return single + lists


def check(engine: Engine, forms: list[dict[str, Any]], count: int, alone: int) -> None:
    """Make `count` answers together, and every few again, `alone` in all, by themselves.

    Float32 sums depend on the batch in their last digits, and a draw from 49,152 tokens now and
    then falls between the two: a few answers may differ.
    """
    settings = [
        SamplingParams(
            temperature=1,
            seed=i,
            max_tokens=200,
            grammar=Grammar("json_schema", json.dumps(forms[i % len(forms)])),
        )
        for i in range(count)
    ]
    prompts = [[{"role": "user", "content": f"Make up example number {i}."}] for i in range(count)]
    names: list[Uses] = [MODELS[i % len(MODELS)] for i in range(count)]
    found = engine.generate(prompts, settings, intervention=names, progress=False)
    ended = 0
    for i, answer in enumerate(found):
        if answer.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), forms[i % len(forms)])
            ended += 1
        else:
            assert answer.choices[0].finish_reason == "length"
    print(f"{ended} of {count} answers ended, all of them valid")
    assert ended > 0.7 * count  # the rest are long
    same = 0
    for i in range(0, count, count // alone):
        [again] = engine.generate(
            [prompts[i]], settings[i], intervention=[names[i]], progress=False
        )
        same += again.tokens == found[i].tokens
    print(f"{same} of {alone} answers are the same alone")
    assert same >= 0.8 * alone - 1


def test_answers_of_many_schemas_are_valid(engine: Engine) -> None:
    check(engine, schemas()[::5], 17, alone=1)


@pytest.mark.long
def test_a_thousand_answers_of_fifty_schemas_are_valid(engine: Engine) -> None:
    check(engine, schemas(), 1000, alone=50)
