"""One rank of a model: `python -m reft_runtime.parallel --rank 1 --address 127.0.0.1:4567`.

The key that rank 0 asks for is in the variable `REFT_RANK_KEY`, in hexadecimal digits.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal

from reft_runtime.quiet import hide_import_messages


def main() -> None:
    """Follow rank 0 until it ends: it takes the signals that end a server, and says so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--address", required=True, metavar="HOST:PORT")
    given = parser.parse_args()
    hide_import_messages()
    from reft_runtime.parallel.follower import follow  # with libraries that say much

    host, _, port = given.address.rpartition(":")
    follow(host, int(port), bytes.fromhex(os.environ.pop("REFT_RANK_KEY")), given.rank)


if __name__ == "__main__":
    main()
