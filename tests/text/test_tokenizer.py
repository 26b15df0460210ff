from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.text import ChatOptions, Message, Tokenizer, chat, time_limit
from tests.helpers.tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizer(), max_model_len=100)
SENTENCEPIECE = Tokenizer(tiny_sentencepiece_tokenizer(), max_model_len=100)


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class TestEncode:
    @pytest.mark.parametrize("text", ["the cat", "", " \u4f60\U0001f600\n", "a\x00b"])
    def test_comes_back(self, text: str) -> None:
        assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text

    def test_special_tokens(self) -> None:
        assert SENTENCEPIECE.encode("the")[0] == 1
        assert 1 not in SENTENCEPIECE.encode("the", add_special_tokens=False)
        ids = BYTE_LEVEL.encode("a<|im_end|>")
        assert ids[-1] == 2
        assert BYTE_LEVEL.decode(ids) == "a"
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "a<|im_end|>"

    def test_text_that_cannot_fit_is_not_tokenised(self) -> None:
        longest = max(map(len, tiny_tokenizer().get_vocab()))
        assert BYTE_LEVEL.encode("a" * (100 * longest))
        with pytest.raises(InvalidRequest, match="100 tokens") as error:
            BYTE_LEVEL.encode("a" * (100 * longest + 1), param="input")
        assert error.value.param == "input"

    @pytest.mark.parametrize("text", ["\ud83d", "a\udc00b"])
    def test_lone_surrogates_are_refused(self, text: str) -> None:
        with pytest.raises(InvalidRequest, match="lone surrogate") as error:
            BYTE_LEVEL.encode(text)
        assert error.value.param == "prompt"

    def test_from_many_threads(self) -> None:
        texts = [f"the {i} and you" * 5 for i in range(200)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(BYTE_LEVEL.encode, texts)) == [BYTE_LEVEL.encode(t) for t in texts]


class TestChat:
    @pytest.mark.parametrize("template", [None, "chat"])
    def test_the_models_own_template(self, template: str | None) -> None:
        ids = BYTE_LEVEL.encode_chat([turn("system", "the"), turn("user", "you")], template)
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == (
            "<|im_start|>system\nthe<|im_end|>\n<|im_start|>user\nyou<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_special_tokens_are_not_added_to_the_models_template(self) -> None:
        inner = tiny_sentencepiece_tokenizer()
        inner.chat_template = "<s>{{ messages[0]['content'] }}"
        ids = Tokenizer(inner, 100).encode_chat([turn("user", "the")])
        assert ids.count(1) == 1

    def test_a_template_with_one_field(self) -> None:
        ids = BYTE_LEVEL.encode_chat([turn("user", "{x}{prompt} %s")], "Q: {prompt}\n{y}A:")
        assert BYTE_LEVEL.decode(ids) == "Q: {x}{prompt} %s\n{y}A:"
        assert SENTENCEPIECE.encode_chat([turn("user", "a")], "{prompt}") == SENTENCEPIECE.encode(
            "a"
        )

    @pytest.mark.parametrize(
        ("messages", "named"),
        [
            ([], "none"),
            ([turn("system", "x")], "system"),
            ([turn("user", "x"), turn("user", "y")], "user, user"),
            ([turn("user", "x"), turn("assistant", "y"), turn("user", "z")], "user, assistant"),
            ([turn("assistant", "x")], "assistant"),
        ],
    )
    def test_which_takes_one_user_message_only(self, messages: list[Message], named: str) -> None:
        with pytest.raises(InvalidRequest, match=f"one user message.*{named}") as error:
            BYTE_LEVEL.encode_chat(messages, "{prompt}")
        assert error.value.param == "messages"

    @pytest.mark.parametrize(
        ("system", "text"), [("prepend", "Q: be\n\nkind\n\nwho A:"), ("drop", "Q: who A:")]
    )
    def test_a_system_turn_in_a_text(self, system: SystemTurn, text: str) -> None:
        messages = [turn("system", "be"), turn("system", "kind"), turn("user", "who")]
        ids = BYTE_LEVEL.encode_chat(messages, "Q: {prompt} A:", system=system)
        assert BYTE_LEVEL.decode(ids) == text
        empty = BYTE_LEVEL.encode_chat([turn("system", ""), messages[-1]], "Q: {prompt} A:")
        assert BYTE_LEVEL.decode(empty) == "Q: who A:"

    def test_a_text_that_refuses_a_system_turn(self) -> None:
        messages = [turn("system", "be"), turn("user", "who")]
        with pytest.raises(InvalidRequest, match="takes no system turn; put its text") as error:
            BYTE_LEVEL.encode_chat(messages, "{prompt}", system="refuse")
        assert error.value.param == "messages"
        assert BYTE_LEVEL.encode_chat(messages[1:], "{prompt}", system="refuse")

    def test_where_the_prompt_ends(self) -> None:
        messages = [turn("user", "you"), turn("assistant", "the ")]
        options = ChatOptions(add_generation_prompt=False)
        ids = BYTE_LEVEL.encode_chat(messages, options=options)
        text = "<|im_start|>user\nyou<|im_end|>\n<|im_start|>assistant\nthe "
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == f"{text}<|im_end|>\n"
        options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
        ids = BYTE_LEVEL.encode_chat(messages, options=options)
        assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize(
        ("options", "template", "param"),
        [
            (ChatOptions(continue_final_message=True), None, "continue_final_message"),
            (ChatOptions(False, True), "{prompt}", "continue_final_message"),
            (ChatOptions(False), "{prompt}", "add_generation_prompt"),
            (ChatOptions(switches={"x": 1}), "{prompt}", "chat_template_kwargs.x"),
        ],
    )
    def test_options_that_do_not_fit(
        self, options: ChatOptions, template: str | None, param: str
    ) -> None:
        with pytest.raises(InvalidRequest) as error:
            BYTE_LEVEL.encode_chat([turn("user", "x")], template, options=options)
        assert error.value.param == param

    @pytest.mark.parametrize("last", ["", " \n"])
    def test_nothing_to_go_on_with(self, last: str) -> None:
        options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
        messages = [turn("user", "x"), turn("assistant", last)]
        with pytest.raises(InvalidRequest, match="no text to go on with") as error:
            BYTE_LEVEL.encode_chat(messages, options=options)
        assert error.value.param == "continue_final_message"

    def test_the_templates_own_switches(self) -> None:
        inner = tiny_tokenizer()
        inner.chat_template = (
            "{%- set own = 1 %}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if enable_thinking %}think{{ own }}{% endif %}{{ tools or '' }}{{ depth }}"
            "{% if add_generation_prompt %}{% generation %}>{% endgeneration %}{% endif %}"
        )
        tokenizer = Tokenizer(inner, 100)
        assert tokenizer.switches == ["depth", "enable_thinking"]
        options = ChatOptions(switches={"enable_thinking": True, "depth": 3})
        ids = tokenizer.encode_chat([turn("user", "you")], options=options)
        assert tokenizer.decode(ids) == "youthink13>"
        for name in ("own", "tools", "messages", "chat_template", "tokenize", "bos_token", "x"):
            options = ChatOptions(switches={name: "x"})
            with pytest.raises(InvalidRequest, match="it has: depth, enable_thinking") as error:
                tokenizer.encode_chat([turn("user", "you")], options=options)
            assert error.value.param == f"chat_template_kwargs.{name}"
        assert BYTE_LEVEL.switches == []
        assert SENTENCEPIECE.switches == []

    def test_names_reach_the_template(self) -> None:
        inner = tiny_tokenizer()
        inner.chat_template = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
        ids = Tokenizer(inner, 100).encode_chat([{**turn("user", "you"), "name": "Ann"}])
        assert BYTE_LEVEL.decode(ids) == "Ann: you"

    @pytest.mark.parametrize(
        "fault",
        [
            "{{ 1 + messages }}",
            "{{ [1, 'a'] | sort }}",
            "{{ messages[0]['content'] | round }}",
            "{{ 1 // 0 }}",
            "{{ messages.nothing.more }}",
            "{{ raise_exception('no') }}",
            "{% for i in range(10 ** 9) %}{% endfor %}",
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            "{{ 'x'.encode('rot13') }}",
        ],
    )
    @pytest.mark.parametrize("answered", [False, True])
    def test_whatever_a_template_raises(self, fault: str, answered: bool) -> None:
        inner = tiny_tokenizer()
        inner.chat_template = fault
        with pytest.raises(InvalidRequest, match="chat template does not take them: ") as error:
            Tokenizer(inner, 100).render([turn("user", "x")], answered=answered)
        assert error.value.param == "messages"

    def test_a_template_that_does_not_come_to_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chat, "WRITING_SECONDS", 0.02)
        monkeypatch.setattr(time_limit, "_LOOK_SECONDS", 0.01)
        monkeypatch.setattr(time_limit, "_watch", time_limit._Watch())  # the other may sleep
        inner = tiny_tokenizer()
        inner.chat_template = (
            "{{ messages[0].content }}{% for _ in range(2000) if messages[1] %}"
            "{% for _ in range(2000) %}{% endfor %}{% endfor %}"
        )
        tokenizer = Tokenizer(inner, 100)
        turns = [turn("user", "x"), turn("assistant", "y")]
        with pytest.raises(InvalidRequest, match="has not written them in") as error:
            tokenizer.render(turns)
        assert error.value.param == "messages"
        assert tokenizer.render(turns[:1]) == "x"

    @pytest.mark.parametrize(
        "content",
        [
            # As SmolVLM's, LLaVA's, and Gemma 3's, which takes both.
            "{% if m['content'][0]['type'] == 'image' %}!{% endif %}"
            "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
            "{% endfor %}",
            "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
            "{% endfor %}",
            "{% if m['content'] is string %}{{ m['content'] }}{% else %}?{% endif %}",
        ],
    )
    def test_templates_that_want_parts_get_them(self, content: str) -> None:
        inner = tiny_tokenizer()
        inner.chat_template = "{% for m in messages %}[" + content + "]{% endfor %}"
        tokenizer = Tokenizer(inner, 100)
        turns = [turn("system", "be"), turn("user", "you"), turn("assistant", "")]
        assert tokenizer.render(turns, answered=True) == "[be][you][]"
        options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
        ids = tokenizer.encode_chat([*turns, turn("assistant", "the")], options=options)
        assert tokenizer.decode(ids) == "[be][you][][the"

    def test_without_a_template(self) -> None:
        with pytest.raises(InvalidRequest, match="use /v1/completions") as error:
            SENTENCEPIECE.encode_chat([turn("user", "x")])
        assert error.value.param == "messages"

    def test_what_the_template_refuses(self) -> None:
        with pytest.raises(InvalidRequest, match="unknown role tool") as error:
            BYTE_LEVEL.encode_chat([turn("tool", "x")])
        assert error.value.param == "messages"

    def test_surrogates_in_a_message(self) -> None:
        for template in (None, "{prompt}"):
            with pytest.raises(InvalidRequest, match="lone surrogate") as error:
                BYTE_LEVEL.encode_chat([turn("user", "\ud800")], template)
            assert error.value.param == "messages"


class TestTokens:
    @pytest.mark.parametrize("text", ["the cat and  you \U0001f600\u4f60 \x00\xff"])
    def test_bytes_join_to_the_text(self, text: str) -> None:
        ids = BYTE_LEVEL.encode(text)
        assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()
        ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
        assert b"".join(map(SENTENCEPIECE.token_bytes, ids)) == b" " + text.encode()

    def test_texts(self) -> None:
        (the,) = BYTE_LEVEL.encode(" the")
        assert BYTE_LEVEL.token_text(the) == " the"
        first, *_ = BYTE_LEVEL.encode("\U0001f600")
        assert BYTE_LEVEL.token_text(first) == "bytes:\\xf0"
        assert BYTE_LEVEL.token_text(2) == "<|im_end|>"
        assert BYTE_LEVEL.token_text(319) == "<filler-319>"
        assert BYTE_LEVEL.token_text(5000) == ""

    @pytest.mark.parametrize("make", [tiny_tokenizer, tiny_sentencepiece_tokenizer])
    @pytest.mark.parametrize("skip", [False, True])
    def test_a_long_text_leaves_other_threads_their_time(
        self, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], skip: bool
    ) -> None:
        """The library's call for one text holds Python's lock all the time, that for many none."""
        inner = make()
        tokenizer = Tokenizer(inner, 100)
        ids = [*range(tokenizer.vocab_size)] * 8
        text = inner.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

        class Watched:
            def __init__(self, library: Any) -> None:
                self._library = library

            def __getattr__(self, name: str) -> Any:
                assert name != "decode"
                return getattr(self._library, name)

        monkeypatch.setattr(inner, "_tokenizer", Watched(inner._tokenizer))
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text

    def test_facts(self) -> None:
        assert BYTE_LEVEL.vocab_size == 320
        assert BYTE_LEVEL.eos_ids == {2}
        described = BYTE_LEVEL.describe()
        assert described["eos_token"] == "<|im_end|>"
        assert described["chat_template"].startswith("{%")
        assert not any(
            "/" in str(value) for name, value in described.items() if "template" not in name
        )
        assert SENTENCEPIECE.describe()["chat_template"] is None
        assert BYTE_LEVEL.special_ids == {0, 1, 2}
        inner = tiny_tokenizer()
        inner.eos_token = None
        assert Tokenizer(inner, 100).eos_ids == frozenset()
