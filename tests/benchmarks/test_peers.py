import sys

import pytest

from benchmarks.peers.client import Peer, PeerFailed

ECHO = "tests.benchmarks.echo_peer"


def test_jobs_run_and_noise_does_not_mix_in() -> None:
    with Peer(ECHO, sys.executable, {"seconds": 2.5}) as peer:
        for token in range(3):
            assert peer.run({"prompts": [[token]], "answers": [1]}) == {
                "seconds": 2.5,
                "tokens": [token],
            }


def test_a_failed_job_says_why_and_the_next_one_runs() -> None:
    with Peer(ECHO, sys.executable, {"seconds": 1}) as peer:
        with pytest.raises(PeerFailed, match=r"ValueError: no prompts(?s:.*)more noise"):
            peer.run({"prompts": [], "answers": []})
        assert peer.run({"prompts": [[7]], "answers": [1]})["tokens"] == [7]


def test_a_peer_that_dies_says_so() -> None:
    with (
        Peer(ECHO, sys.executable, {"seconds": 1}) as peer,
        pytest.raises(PeerFailed, match=r"it ended(?s:.*)more noise"),
    ):
        peer.run({"prompts": [[7]], "answers": [0]})


def test_a_peer_that_does_not_load_says_why() -> None:
    with pytest.raises(
        PeerFailed, match=r"it ended(?s:.*)noise(?s:.*)ValueError: too little memory"
    ):
        Peer(ECHO, sys.executable, {"refuse": "too little memory"})
