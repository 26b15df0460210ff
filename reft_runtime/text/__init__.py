"""Text for the callers of the engine, which itself works on token ids only."""

from reft_runtime.text.chat import ChatOptions, Message
from reft_runtime.text.stream import Detokenizer, StopChecker, TextOffsets, TextStream
from reft_runtime.text.tokenizer import Tokenizer

__all__ = [
    "ChatOptions",
    "Detokenizer",
    "Message",
    "StopChecker",
    "TextOffsets",
    "TextStream",
    "Tokenizer",
]
