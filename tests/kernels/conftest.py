"""Which tests of kernels run where."""

import sys

# There is no Triton for other systems.
collect_ignore = [] if sys.platform == "linux" else ["test_cuda_operators.py"]
