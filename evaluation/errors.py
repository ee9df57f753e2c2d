"""The two exceptions, for an error of one case and for an error of the whole run; their messages and the exit codes."""

import sys
from collections.abc import Callable
from pathlib import Path


class CaseError(ValueError):
    """This case cannot be evaluated; one sentence says what came and what was expected. The other cases continue."""


class InputError(ValueError):
    """Bad arguments, or nothing to evaluate; one sentence says what came and what was expected. Exit code 2."""


def printable(text: str) -> str:
    """The text, with escapes for bytes of file names that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def short(path: Path) -> str:
    """The name of the file with its folder, for messages."""
    return printable("/".join(path.parts[-2:]))


def exit_code(job: Callable[[], None]) -> int:
    """Run a command's job and return 0 for done, 2 for bad input, 1 for a fault; errors print a sentence to stderr."""
    try:
        job()
    except (InputError, CaseError) as error:  # a command for a single case ends here, too
        print(error, file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
