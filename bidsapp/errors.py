"""The few exceptions a user meets. Each message says what was found, what is needed, what to do."""


class QSphereError(Exception):
    """Base of every error that is shown to the user without a traceback."""


class UsageError(QSphereError):
    """The command line, or the whole input, cannot be used: exit code 2."""


class DataError(QSphereError):
    """One run or one participant cannot be processed; the others can: exit code 1."""


class Refusal(QSphereError):
    """A method does not apply to this acquisition: noted in the report, the rest goes on."""
