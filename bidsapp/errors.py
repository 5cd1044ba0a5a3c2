"""The few exceptions a user meets. Each message says what was found, what is needed, what to do."""


class QSphereError(Exception):
    """Base of every error that is shown to the user without a traceback."""


class UsageError(QSphereError):
    """The command line, or the whole input, cannot be used: exit code 2."""


class DataError(QSphereError):
    """One run or one participant cannot be processed; the others can: exit code 1."""


class Refusal(QSphereError):
    """A method does not apply to this acquisition: noted in the report, the rest goes on."""


def describe(error: BaseException) -> str:
    """Say what an error is: its own message, after its type where it was not foreseen.

    Python's MemoryError often has no message, so it gets one.
    """
    if isinstance(error, QSphereError):
        return str(error)
    if isinstance(error, MemoryError):
        return ("memory ran out" + (f" ({error})" if str(error) else "") + ". Process fewer "
                "participants at a time with --omp-nthreads, limit the memory with --mem-mb, or "
                "use a machine with more.")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
