"""Turns text and chat messages into token ids, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.interventions.format.template import (
    CHAT,
    TEMPLATE_FIELD,
    around,
    is_text,
    laid_out,
)
from reft_runtime.reasoning import Channels, Marks, Thinking, find_marks
from reft_runtime.text.chat import (
    ChatOptions,
    Message,
    check_switches,
    fill,
    render,
    source_of,
    switches_of,
)
from reft_runtime.text.fifo import FifoLock

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes the tokens that stand for one byte."""

_AT_ONCE = 1024
"""Most ids that are decoded by the library's call for one text, which stops all other threads."""

_MARK_TOKENS = 8
"""A mark at the end of a prompt, and the blanks behind it, are no more tokens than these."""


class Tokenizer:
    """A model's tokenizer with the checks that a request needs; safe to use from many threads.

    `max_model_len` is the most tokens a request may have. A text that cannot fit is refused by its
    length alone, before it is tokenised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        # transformers' tokenizers keep settings that an encoding call may rewrite.
        self._encoding = FifoLock()
        vocabulary = tokenizer.get_vocab()
        # A byte-level token is written with one character per byte, so this is never too short.
        self._max_chars = max_model_len * max(map(len, vocabulary))
        self._max_model_len = max_model_len
        added = tokenizer.added_tokens_decoder
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = (
            {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
            if tokenizer.convert_tokens_to_string(["\u0120"]) == " "
            else None
        )
        self._known_bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Token ids that have a text are below this; the model's own vocabulary may be padded."""
        return len(self._tokenizer)

    @property
    def max_model_len(self) -> int:
        """The most tokens that a request, or a row, may have."""
        return self._max_model_len

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokenizer's EOS id, if it has one; a model's generation config may name more."""
        eos = self._tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset({eos})

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out of the text."""
        return self._special

    @property
    def byte_level(self) -> bool:
        """Whether the text of ids is that of their bytes, joined: no token changes another's."""
        return self._bytes is not None and self._tokenizer.is_fast

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        completion_prefix: str = "",
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of `text`; special tokens written in it are parsed as such.

        `completion_prefix`, which the answer is to begin with, is removed from the end of the text,
        because a tokenizer joins a space with the word after it.

        `InvalidRequest` names `param` if the text is not valid Unicode or, by its length alone,
        cannot fit into `max_model_len` tokens.
        """
        if len(text) > self._max_chars:
            raise InvalidRequest(
                f"{param}: {len(text)} characters cannot fit into the model's "
                f"{self._max_model_len} tokens; shorten the text.",
                param=param,
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param}: not valid Unicode, a lone surrogate at character {error.start}.",
                param=param,
            ) from None
        if completion_prefix:
            text = text.rstrip(completion_prefix)
        with self._encoding:
            ids: list[int] = self._tokenizer(
                text, add_special_tokens=add_special_tokens, verbose=False
            )["input_ids"]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        *,
        system: SystemTurn = "prepend",
        completion_prefix: str = "",
        options: ChatOptions | None = None,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        """Token ids of a prompt that asks for the next turn of `messages`.

        `template` None or "chat" is the model's own chat template, whose output is tokenised
        without special tokens. Any other is a text with one field `{prompt}`, which takes the
        content of exactly one user message, and of system turns as `system` says; it is tokenised
        with the tokenizer's default special tokens, as pyreft does for training.
        `add_special_tokens`, if given, decides instead. Raises `InvalidRequest`, which names the
        field that does not fit the template.
        """
        options = options or ChatOptions()
        if is_text(template):
            text, special = fill(template, system, messages, options), True
        else:
            if options.switches:
                given = options.template_for(messages)
                known = switches_of(self._tokenizer, given) if given else self.switches
                check_switches(options.switches, known)
            text, special = render(self._tokenizer, messages, options), False
        if add_special_tokens is not None:
            special = add_special_tokens
        return self.encode(
            text,
            add_special_tokens=special,
            completion_prefix=completion_prefix,
            param="messages",
        )

    def render(self, messages: Sequence[Message], *, answered: bool = False) -> str:
        """A chat as the model's own template writes it, to be encoded without special tokens.

        It ends where the next turn is to begin or, with `answered`, after the last turn.
        """
        return render(self._tokenizer, messages, ChatOptions(add_generation_prompt=not answered))

    @property
    def knows_chats(self) -> bool:
        """Whether the model brings a chat template."""
        return bool(self._tokenizer.chat_template)

    def laid_out(self, text: str, template: str) -> str | None:
        """The text as a whole prompt if it ends as the template ends prompts, else None.

        "chat" is the model's own template. Spaces and line ends at the end of the text are replaced
        by the template's.
        """
        return laid_out(text, self._behind if template == CHAT else around(template)[1])

    @cached_property
    def _behind(self) -> str:
        """The text that the model's own chat template writes after a user's message."""
        asked = self.render([{"role": "user", "content": TEMPLATE_FIELD}])
        return asked.rpartition(TEMPLATE_FIELD)[2]

    @cached_property
    def switches(self) -> list[str]:
        """Names of the chat template's own variables, such as `enable_thinking`."""
        return switches_of(self._tokenizer)

    @cached_property
    def marks(self) -> Marks | Channels | None:
        """What stands around what the model thinks; None if its chat template knows nothing."""
        return find_marks(source_of(self._tokenizer), self.token_id)

    @property
    def frame(self) -> str:
        """The `Grammar.frame` of answers to chats; empty if nothing but thoughts is before them."""
        return self.marks.frame if isinstance(self.marks, Channels) else ""

    def thinking(self, prompt: Sequence[int], said: str | None = None) -> Thinking | None:
        """What the model may write before its answer to a chat; None if it answers at once.

        `said` is the text of the turn that the answer goes on with, if it begins none.
        """
        if self.marks is None:
            return None
        if said is not None:
            return self.marks.within(said)
        return self.marks.after(self.decode(prompt[-_MARK_TOKENS:], skip_special_tokens=False))

    def definition(self) -> str | None:
        """The content of the tokenizer's `tokenizer.json`; None for one that has none."""
        if not self._tokenizer.is_fast:
            return None
        inner = copy(self._tokenizer.backend_tokenizer)
        inner.no_padding()
        inner.no_truncation()
        return str(inner.to_str())

    @property
    def tool_template(self) -> str:
        """The model's own chat template for chats with tools; empty if it has none."""
        return source_of(self._tokenizer, tools=True)

    def token_id(self, text: str) -> int | None:
        """Id of the token that was added to the vocabulary for a text; None if there is none."""
        return self._added_ids.get(text)

    def describe(self) -> dict[str, Any]:
        """What a client needs to write prompts itself: special tokens and the chat template."""
        inner = self._tokenizer
        return {
            "tokenizer_class": type(inner).__name__,
            "vocab_size": self.vocab_size,
            "model_max_length": self._max_model_len,
            **{name: str(token) for name, token in inner.special_tokens_map.items()},
            "chat_template": inner.chat_template,
        }

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; U+FFFD stands for bytes that are not UTF-8."""
        ids = list(ids)
        own = getattr(type(self._tokenizer), "_decode", None)
        if len(ids) > _AT_ONCE and own is PreTrainedTokenizerFast._decode:
            inner = self._tokenizer.backend_tokenizer
            [text] = inner.decode_batch([ids], skip_special_tokens=skip_special_tokens)
            return str(text)
        text = self._tokenizer.decode(
            ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to a text, often part of a character; empty if unknown."""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = self._token_bytes(token_id)
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if self._bytes is not None:
            return bytes(self._bytes[char] for char in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace("\u2581", " ").encode()

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own entries for `ids`, as the tokenizer's maker wrote them."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def token_text(self, token_id: int) -> str:
        r"""A token as OpenAI's logprobs show it: its text, or `bytes:\xf0\x9f` where it is none."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
