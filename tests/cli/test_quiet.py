"""What libraries say at every import is kept from standard error, and nothing else of theirs."""

import subprocess
import sys

BEHIND_MAIN = """
import logging
from server.cli import main
main.app = lambda **_: 0
try:
    main.main()
except SystemExit:
    pass
{}
"""


def told(code: str) -> str:
    """Standard error of Python code that runs in a process where the command has begun."""
    call = [sys.executable, "-c", BEHIND_MAIN.format(code)]
    return subprocess.run(call, check=True, capture_output=True, text=True).stderr


def test_messages_of_imports_are_hidden_and_no_others() -> None:
    lines = told(
        "ao, tree = logging.getLogger('torchao'), logging.getLogger('torch.utils._pytree')\n"
        "ao.warning(f'Failed to load _C_mxfp8.so: no such library')\n"
        "tree.warning('%s is an Enum subclass and is now natively supported', int)\n"
        "ao.warning('no kernels for %s', 'int8')\n"
        "tree.warning('a pytree')\n"
        "logging.getLogger('other').warning('Failed to load it')\n"
    )
    assert lines.splitlines() == ["no kernels for int8", "a pytree", "Failed to load it"]
