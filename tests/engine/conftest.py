"""Fixtures of the engine's tests."""

import sys

from tests.helpers.pages import storages as storages

# There is no Triton for other systems.
collect_ignore = (
    [] if sys.platform == "linux" else ["test_device.py", "test_graphs.py", "test_sampling.py"]
)
