"""What ends an answer is decided once, for training and serving."""

import pytest
from transformers import GenerationConfig

from reft_runtime.base.generation import ends_of_answers, ignored_settings
from reft_runtime.loading.base import load_base
from reft_runtime.text import Tokenizer
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.rows import Row
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.tokenizer import tiny_tokenizer


@pytest.mark.parametrize("own", [None, 7, [7, 9]])
@pytest.mark.parametrize("of_config", [None, 5])
def test_what_training_writes_at_the_end_ends_an_answer(
    own: int | list[int] | None, of_config: int | None
) -> None:
    model = tiny("llama", eos_token_id=of_config)
    model.generation_config = GenerationConfig(eos_token_id=own)  # type: ignore[no-untyped-call]
    tokenizer = tiny_tokenizer()
    _, loaded, _ = load_base(model, tokenizer, "float32", None)
    row = Row("row 1", {"prompt": "the", "completion": " and"})
    formatter = Formatter(Layout(None, row), Tokenizer(tokenizer, 256), loaded.eos_ids)
    written = formatter.example(row).completion[-1]
    assert written == tokenizer.eos_token_id
    assert written in loaded.eos_ids
    named = own if isinstance(own, list) else [of_config if own is None else own]
    assert loaded.eos_ids >= {each for each in named if each is not None}


def test_ids_outside_of_the_vocabulary_end_nothing() -> None:
    model = tiny("llama")
    ends = [-1, 7, VOCABULARY]
    model.generation_config = GenerationConfig(eos_token_id=ends)  # type: ignore[no-untyped-call]
    assert ends_of_answers(model, None) == {7}


def test_settings_that_are_not_applied() -> None:
    model = tiny("llama")
    assert ignored_settings(model) == {}
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=2, max_length=99, do_sample=True, top_p=0.9, repetition_penalty=1.3
    )
    assert ignored_settings(model) == {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3}
