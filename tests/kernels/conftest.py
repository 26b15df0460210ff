"""Which tests of kernels run where, and the CPU's operators for them."""

import sys

import pytest

from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.operators import cpu_operators

# There is no Triton for other systems.
collect_ignore = [] if sys.platform == "linux" else ["test_cuda_operators.py"]


@pytest.fixture
def operators() -> Kernels:
    found = cpu_operators()
    assert found is not None, "the tests need a C++ compiler"
    return found
