"""Tokens are counted as a sequence grows, each once."""

from collections import Counter

import pytest

from reft_runtime.schedule.token_counts import TokenCounts


@pytest.mark.parametrize("sizes", [(7,), (3, 7), (0, 1, 2, 3, 4, 5, 6, 7), (4, 4, 7)])
def test_counts_are_those_of_all_tokens_however_they_came(sizes: tuple[int, ...]) -> None:
    tokens = [5, 9, 5, 9, 2, 2, 5]
    counts = TokenCounts(3)
    for size in sizes:
        counts.take(tokens[:size])
    answer = Counter(tokens[3:])
    assert counts.ids.tolist() == [5, 9, 2]
    assert counts.times.tolist() == [answer[5], answer[9], answer[2]] == [1, 1, 2]


def test_tokens_of_the_prompt_alone_are_there_without_times() -> None:
    counts = TokenCounts(2)
    counts.take([4, 8])
    assert counts.ids.tolist() == [4, 8]
    assert counts.times.tolist() == [0, 0]
