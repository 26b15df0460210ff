"""Text on the caller's side of the engine, which itself speaks token ids only."""

from reft_runtime.text.stream import Detokenizer, StopChecker, TextStream
from reft_runtime.text.tokenizer import Message, Tokenizer

__all__ = ["Detokenizer", "Message", "StopChecker", "TextStream", "Tokenizer"]
