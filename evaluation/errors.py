"""The two exceptions, what spoils one case and what spoils the whole run; their sentences, and the exit codes."""

import sys
from collections.abc import Callable
from pathlib import Path


class CaseError(ValueError):
    """This case cannot be evaluated: one sentence with what came and what was expected. The others go on."""


class InputError(ValueError):
    """Bad arguments or nothing to evaluate: one sentence with what came and what was expected. Exit code 2."""


def printable(text: str) -> str:
    """Bytes of a file's name that are not UTF-8 become escapes."""
    return text.encode(errors="backslashreplace").decode()


def short(path: Path) -> str:
    """The file with its folder, as a sentence names it."""
    return printable("/".join(path.parts[-2:]))


def exit_code(job: Callable[[], None]) -> int:
    """Runs a command line's job: 0 done; 2 bad input, 1 a fault, with a sentence on stderr."""
    try:
        job()
    except (InputError, CaseError) as error:  # a command for a single case is at its end, too
        print(error, file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
