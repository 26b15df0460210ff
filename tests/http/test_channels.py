"""What gpt-oss thinks, answers and calls, each on a channel of its own, from a text in pieces."""

from __future__ import annotations

import random
import time

import pytest

from reft_runtime.reasoning import Channels, Thinking, find_marks
from server.channels import ChannelReader

CHANNELS = Channels(1, 2, 3, 4, 5)
IDS = {
    "<|start|>": 1,
    "<|channel|>": 2,
    "<|message|>": 3,
    "<|constrain|>": 4,
    "<|end|>": 5,
}
OPEN = "<|channel|>analysis<|message|>"
ANALYSIS = OPEN + "Hm <5.<|end|>"
PYTHON = "<|channel|>analysis to=python code<|message|>1<|end|>"
NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>It is."
CALL = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}"
READ = "<|channel|>commentary to=functions.look<|message|>{}"


def tokens(text: str) -> list[int]:
    """A token for each mark and for every other letter."""
    ids = []
    while text:
        mark = next((mark for mark in IDS if text.startswith(mark)), text[0])
        ids.append(IDS.get(mark, 100))
        text = text[len(mark) :]
    return ids


def thought_with(text: str) -> int:
    return len(tokens(text))


CASES = [
    (ANALYSIS + NEXT + FINAL, "Hm <5.", "It is.", thought_with(ANALYSIS)),
    (FINAL, "", "It is.", 0),
    (ANALYSIS + NEXT + CALL, "Hm <5.", READ, thought_with(ANALYSIS)),
    (" to=functions.look<|channel|>commentary json<|message|>{}", "", READ, 0),
    (ANALYSIS + NEXT + CALL.replace("functions.", ""), "Hm <5.", READ, thought_with(ANALYSIS)),
    ("<|channel|>commentary to=browser.open<|message|>{}", "", "{}", 0),
    (
        ANALYSIS + NEXT + " to=functions.look<|channel|>commentary json<|message|>{}",
        "Hm <5.",
        READ,
        thought_with(ANALYSIS),
    ),
    (
        ANALYSIS + NEXT + "<|channel|>commentary<|message|>Let me look.<|end|>" + NEXT + CALL,
        "Hm <5.",
        f"Let me look.\n\n{READ}",
        thought_with(ANALYSIS),
    ),
    (
        ANALYSIS + NEXT + ANALYSIS + NEXT + FINAL + "<|end|>" + NEXT + FINAL,
        "Hm <5.\n\nHm <5.",
        "It is.\n\nIt is.",
        thought_with(ANALYSIS + NEXT + ANALYSIS),
    ),
    # Without the mark that ends a message.
    (OPEN + "a" + NEXT + FINAL, "a", "It is.", thought_with(OPEN + "a")),
    (OPEN + "a" + FINAL, "a", "It is.", thought_with(OPEN + "a")),
    # A tool of the model's own is none of ours.
    (PYTHON + NEXT + FINAL, "1", "It is.", thought_with(PYTHON)),
    ("<|channel|>final <|constrain|>json<|message|>{}", "", "{}", 0),
    ("Plain, <5 or <|x|>.", "", "Plain, <5 or <|x|>.", 0),
    ("to=function", "", "", 0),
    (" \n", "", " \n", 0),
    ("", "", "", 0),
    ("<|channel|>analysis", "", "", 0),
    (OPEN + "a <|en", "a <|en", "", thought_with(OPEN + "a <|en")),
    (ANALYSIS, "Hm <5.", "", thought_with(ANALYSIS)),
    (ANALYSIS + NEXT, "Hm <5.", "", thought_with(ANALYSIS)),
    (ANALYSIS + " so be it", "Hm <5.", " so be it", None),
]


@pytest.mark.parametrize(("says", "thought", "answer", "counted"), CASES)
def test_a_text_is_parted_wherever_it_is_cut(
    says: str, thought: str, answer: str, counted: int | None
) -> None:
    rng = random.Random(says)
    for opened in (False, True):
        if opened and not says.startswith(OPEN):
            continue
        text = says.removeprefix(OPEN) if opened else says
        for _ in range(40):
            reader = ChannelReader(CHANNELS, open=opened)
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(len(text) + 2)))
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            found, ids, count = ["", ""], tokens(text), 0
            for position, part in enumerate(parts, 1):
                gained = reader.read(part, ended=position == len(parts))
                # The tokens of a text may come before or behind it.
                share = len(ids) if position == len(parts) else rng.randrange(len(ids) + 1)
                count += reader.count(ids[:share])
                ids = ids[share:]
                found = [a + b for a, b in zip(found, gained, strict=True)]
            assert found == [thought, answer]
            if counted is not None:
                assert count == counted - (thought_with(OPEN) if opened else 0)


def test_channels_are_those_that_a_template_writes_and_single_tokens() -> None:
    template = "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking }}"
    assert find_marks(template, IDS.get) == CHANNELS
    assert find_marks(template, {"<|channel|>": 2}.get) is None
    assert find_marks("<|channel|>", IDS.get) is None


def test_how_an_answer_begins_is_seen_at_the_end_of_the_prompt() -> None:
    assert CHANNELS.after("Hi<|end|><|start|>assistant") == Thinking(CHANNELS, open=False)
    assert CHANNELS.after("Hi<|end|>") == Thinking(CHANNELS, open=False)
    begun = "<|start|>assistant<|channel|>analysis<|message|>"
    assert CHANNELS.after(begun) == Thinking(CHANNELS, open=True)
    assert CHANNELS.after(begun.replace("analysis", "final") + "\n") is None
    assert CHANNELS.within("said") is None


def test_the_time_for_a_header_without_an_end_grows_with_its_length() -> None:
    reader = ChannelReader(CHANNELS, open=False)
    begun = time.process_time()
    for token in (CHANNELS.channel_id, *[99] * 10_000):
        assert reader.read("<|channel|>" if token != 99 else " x", ended=False) == ("", "")
        assert reader.count([token]) == 0
    assert time.process_time() - begun < 2
