"""What the measurement of grammar engines is made with."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from benchmarks.grammar_engines import Vocabulary, greedy
from benchmarks.grammar_schemas import sample
from benchmarks.grammar_tasks import strict, task_schemas


def test_texts_are_split_into_the_longest_tokens() -> None:
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"abc", b"c", b"bc"], end=3)
    assert greedy(vocabulary)(b"abcab") == [2, 4, 2]


def test_strict_schemas_are_closed_and_require_all() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "default": "x"}}}
    assert strict(schema) == {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "additionalProperties": False,
        "required": ["a"],
    }


@pytest.mark.parametrize("name", task_schemas())
def test_examples_of_tasks_are_valid_and_broken_ones_are_not(name: str) -> None:
    schema = task_schemas()[name]
    made = sample(name, schema)
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert made.valid
    assert made.invalid
    assert all(validator.is_valid(json.loads(text)) for text in made.valid)
    assert not any(validator.is_valid(json.loads(text)) for text in made.invalid)
