"""Which tests of keys and values run where."""

import sys

# There is no Triton for other systems.
collect_ignore = [] if sys.platform == "linux" else ["test_page_attention.py"]
