"""The one exception for what the user can put right, and the exit codes."""

import logging
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input or arguments: one sentence that names the file, what came and what was expected. Exit code 2."""


def exit_code(job: Callable[[], None]) -> int:
    """Runs a command line's job, progress on stdout: 0 done; 2 bad input, 1 a fault, with a sentence on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        job()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
