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


IMPORTED_BY_US = """
import logging, sys, types
import reft_runtime

class Home(types.ModuleType):
    def __getattr__(self, name):
        logging.getLogger("torchao").warning("Failed to load _C_mxfp8.so: no such library")
        logging.getLogger("torchao").warning("no kernels")
        return name

sys.modules["reft_runtime.front.engine"] = Home("reft_runtime.front.engine")
reft_runtime.Engine
logging.getLogger("torchao").warning("Failed to load another")
"""


def test_the_packages_own_import_is_quiet_and_changes_no_logger() -> None:
    call = [sys.executable, "-c", IMPORTED_BY_US]
    lines = subprocess.run(call, check=True, capture_output=True, text=True).stderr
    assert lines.splitlines() == ["no kernels", "Failed to load another"]
