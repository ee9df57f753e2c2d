"""Work for processes that die. A file of its own: each of them imports it."""

import os
import signal


def double_or_die(number: int) -> int:
    """Doubles; but 13 is killed by the system, and 7 a fault."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise RuntimeError("a fault")
    return 2 * number
