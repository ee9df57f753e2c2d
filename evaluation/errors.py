"""The two exceptions: what spoils one case, and what spoils the whole run; and the exit codes."""

import sys
from collections.abc import Callable


class CaseError(ValueError):
    """This case cannot be evaluated: one sentence with what came and what was expected. The others go on."""


class InputError(ValueError):
    """Bad arguments or nothing to evaluate: one sentence with what came and what was expected. Exit code 2."""


def exit_code(job: Callable[[], None]) -> int:
    """Runs a command line's job: 0 done; 2 bad input, 1 a fault, with a sentence on stderr."""
    try:
        job()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
