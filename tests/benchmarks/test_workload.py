from benchmarks.measuring import SECONDS
from benchmarks.workload import (
    MIXED_ANSWERS,
    MIXED_PROMPTS,
    MIXED_REQUESTS,
    closed,
    figures,
    mixed,
    percentile,
)


def test_closed_prompts_differ_by_seed_only() -> None:
    assert closed(100, 3, "a") == closed(100, 3, "a")
    assert closed(100, 3, "a")["prompts"] != closed(100, 3, "b")["prompts"]
    assert [len(prompt) for prompt in closed(100, 3, "a")["prompts"]] == [64] * 3


def test_mixed_has_the_same_lengths_and_arrivals_for_every_seed() -> None:
    one, other = mixed(100, "a"), mixed(100, "b")
    assert one["prompts"] != other["prompts"]
    assert [len(p) for p in one["prompts"]] == [len(p) for p in other["prompts"]]
    assert (one["answers"], one["arrivals"]) == (other["answers"], other["arrivals"])
    assert len(one["answers"]) == MIXED_REQUESTS
    for lengths, (low, high) in (
        ([len(p) for p in one["prompts"]], MIXED_PROMPTS),
        (one["answers"], MIXED_ANSWERS),
    ):
        assert low <= min(lengths) < 2 * low
        assert high / 2 < max(lengths) <= high
    assert one["arrivals"] == sorted(one["arrivals"])


def test_figures_of_streams() -> None:
    found = figures({"seconds": 9, "tokens": [], "stamps": [[1, 2, 4], [3, 3.5]]})
    assert found == {SECONDS: 9, "ttft_median": 2, "ttft_p95": 3, "gap_p95": 2}
    assert figures({"seconds": 9, "tokens": []}) == {SECONDS: 9}


def test_percentile() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 95) == 95
    assert percentile([7.0], 95) == 7
