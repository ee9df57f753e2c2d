"""The one exception for what the user can put right."""


class InputError(ValueError):
    """Bad input or arguments: one sentence that names the file, what came and what was expected. Exit code 2."""
