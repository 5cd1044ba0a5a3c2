"""Exceptions for users. Each message says what was found, what is needed and what to do."""


class QSphereError(Exception):
    """Base of every error that is shown to the user without a traceback."""


class UsageError(QSphereError):
    """The command line or the whole input cannot be used: exit code 2."""


class DataError(QSphereError):
    """One run or one participant cannot be processed, but others can: exit code 1."""


class Refusal(QSphereError):
    """A method does not apply to a run; the report says so, and other methods run.

    The exit code is 1 if the command names the method, and 0 if it belongs to the default set.
    """


def describe(error: BaseException) -> str:
    """Describe an error for users.

    Parameters
    ----------
    error : BaseException
        Any exception.

    Returns
    -------
    str
        The message of the error, with its type if it is not one of this module. MemoryError, which
        often has no message, gets one.
    """
    if isinstance(error, QSphereError):
        return str(error)
    if isinstance(error, MemoryError):
        return ("memory ran out" + (f" ({error})" if str(error) else "") + ". Process fewer "
                "participants at a time with --omp-nthreads, limit the memory with --mem-mb, or "
                "use a machine with more memory.")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
