"""The two exceptions: what spoils one case, and what spoils the whole run."""


class CaseError(ValueError):
    """This case cannot be evaluated: one sentence with what came and what was expected. The others go on."""


class InputError(ValueError):
    """Bad arguments or nothing to evaluate: one sentence with what came and what was expected. Exit code 2."""
