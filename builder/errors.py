"""The one error that is the user's to mend."""


class UserError(Exception):
    """What a user did wrong, or what the machine lacks, in one line.

    The message names the file or field, the value, and the remedy. The commands print it
    without a traceback and exit with 1.
    """


def describe(error: Exception) -> str:
    """The line of an error; the system's own name their file and reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
