"""What a model in this process thinks, told from its answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken

from reft_runtime import SamplingParams
from server.cli.backend import Ask, LocalBackend
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.tokenizer import CHATML, tiny_tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_are_no_part_of_an_answer(tmp_path: Path, special: bool) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(VOCABULARY - 2)
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in ("<think>", "</think>")])
    opened = "{% if add_generation_prompt %}<think>\n{% endif %}{% if x %}</think>{% endif %}"
    tokenizer.chat_template = CHATML + opened
    tokenizer.save_pretrained(tmp_path)
    end = VOCABULARY - 1
    backend = LocalBackend({"model": str(tmp_path), "interventions": []})
    try:
        for bias, thinks in ((-100, True), (100, False)):
            sampling = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: bias})
            said, thought = list[str](), list[str]()
            ask = Ask([{"role": "user", "content": "Hi"}], backend.resolve([]), sampling)
            reply = backend.answer(ask, said.append, thought.append)
            assert bool("".join(thought)) == thinks
            assert reply.text == "".join(said) == ("" if thinks else "</think>" * 4)
            assert backend.answers([ask])[0].text == reply.text
            assert reply.tokens == 5
    finally:
        backend.close()
