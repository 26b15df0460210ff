"""What the server of `tests.helpers.forked` has imported when it forks."""

import atexit
import os

import tests.http.serve_fake  # noqa: F401

atexit.register(os._exit, 0)  # without what torch's libraries say at the end
