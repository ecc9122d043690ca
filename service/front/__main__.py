"""`python -m service.front`: a front end. Started by the engine process, and ends with it."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    # A terminal's Ctrl-C and a service manager's SIGTERM reach all processes, from the first moment; when a front end
    # ends, the engine process says.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from service.front.front_end import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
