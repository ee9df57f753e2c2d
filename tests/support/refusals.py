"""What a user is told of an input that is not right."""

from collections.abc import Callable
from pathlib import Path

import pytest

from algorithm.errors import InputError


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """The sentence with which ``read`` refuses: one line that names the file and says what was expected."""
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "expected" in message
    assert "\n" not in message and "ITK" not in message.replace(str(path), "")
    return message


def sentence(stderr: str) -> str:
    """The last line; there is no traceback above it."""
    assert "Traceback" not in stderr
    assert stderr.endswith("\n")
    return stderr.splitlines()[-1]
