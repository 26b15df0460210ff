"""Where the command `reft` begins: before what takes a second to import."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command. Until it is read Ctrl-C ends the process at once, without a traceback."""
    takes = signal.getsignal(signal.SIGINT)
    if takes is signal.default_int_handler:  # else it is ignored, as in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from server.cli.main import main as run

    if takes is signal.default_int_handler:
        signal.signal(signal.SIGINT, takes)
    run()


if __name__ == "__main__":
    main()
