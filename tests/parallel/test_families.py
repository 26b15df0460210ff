"""Models with more than a Llama has, over two ranks."""

from pathlib import Path

from tests.parallel.conftest import both_cores
from tests.parallel.test_ranks import mixed, same


def test_windows_norms_and_gains_of_gemma(tmp_path: Path) -> None:
    with both_cores("gemma3_text", tmp_path) as cores:
        same(cores, *mixed(5, max_tokens=10), after=1)
