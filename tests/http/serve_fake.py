"""A server process on the fake engine, whose options and the server's come as JSON objects."""

from __future__ import annotations

import json
import os
import sys

from server.lifecycle import check_exposure, listen, listen_for_metrics, run
from server.logs import configure_logging
from server.settings import load_settings
from tests.http.fake_engine import FakeEngine


def main(engine_options: str, options: str) -> int:
    """Serve until a signal; returns the exit status."""
    settings = load_settings({"port": 0, **json.loads(options)})
    configure_logging(settings)
    with listen(settings.host, settings.port) as listener, listen_for_metrics(settings) as other:
        check_exposure(listener, settings)
        return run(FakeEngine(**json.loads(engine_options)), settings, listener, other)


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # as the command ends, without what torch's libraries say then
