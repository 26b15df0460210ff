"""What the server of `tests.helpers.forked` has imported when it forks."""

import atexit
import os

import reft_runtime.front.engine
import reft_runtime.training.run  # noqa: F401
import server.cli.main  # noqa: F401
import tests.http.serve_fake  # noqa: F401

atexit.register(os._exit, 0)  # without what torch's libraries say at the end
