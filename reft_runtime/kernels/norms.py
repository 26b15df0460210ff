"""The forms of RMSNorm that models have; they differ in what is rounded, and in the weight."""

from enum import Enum, auto


class NormForm(Enum):
    """How an RMSNorm applies its weight to rows that are divided by their root mean square.

    In `LLAMA` the rows are rounded to their dtype, then multiplied by the weight. In `OLMO2` and
    `GEMMA` nothing is rounded before; Gemma multiplies by 1 + the weight.
    """

    LLAMA = auto()
    OLMO2 = auto()
    GEMMA = auto()
