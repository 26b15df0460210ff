"""Answers of a given form: grammars compiled for a tokenizer, and which tokens they allow next."""

from reft_runtime.grammar.compiler import GrammarCompiler
from reft_runtime.grammar.state import GrammarState

__all__ = ["GrammarCompiler", "GrammarState"]
